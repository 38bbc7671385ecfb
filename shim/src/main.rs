//! The program that containerd starts for a handler of ours.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    // It comes back only when the shim behind it cannot be run, or the sandbox is refused; both have been said.
    km_shim::run(&argv)
}
