//! The program that Kata starts in place of QEMU.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    km_shim::launch::run(&argv)
}
