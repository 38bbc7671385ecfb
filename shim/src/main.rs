//! The program that containerd starts for a handler of ours; under the name `kata-manager-qemu` it is the one that Kata starts in place of
//! QEMU. One file serves both, so that they are always of one version.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    if km_shim::launch::is_called(&argv) {
        return km_shim::launch::run(&argv);
    }
    // It comes back only when the shim behind it cannot be run, or the sandbox is refused; both have been said.
    km_shim::run(&argv)
}
