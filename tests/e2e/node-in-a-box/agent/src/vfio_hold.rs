//! `vfio-hold GROUP ADDRESS`: opens a device as a virtual machine does, closes the group's node and the container's, keeps the
//! device alone, and waits to be ended. A holder of this kind has nothing open whose name tells which device it is.
//!
//! The kernel's side is <https://docs.kernel.org/driver-api/vfio.html>; the numbers are those of `include/uapi/linux/vfio.h`.

#![expect(
    unsafe_code,
    reason = "VFIO's ioctls, in a program that runs in a virtual machine made for that"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "an empty file, in a virtual machine made for that"
)]

use std::ffi::{CString, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};

/// `VFIO_TYPE`.
const TYPE: u8 = b';';
const SET_IOMMU: Opcode = opcode::none(TYPE, 102);
const SET_CONTAINER: Opcode = opcode::none(TYPE, 104);
const GET_DEVICE_FD: Opcode = opcode::none(TYPE, 106);

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE_1_V2: usize = 3;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let mut word = || words.next().context("usage: vfio-hold GROUP ADDRESS");
    let (group, address) = (word()?, CString::new(word()?)?);
    let ready = std::env::var_os("READY").context("READY names the file to make")?;
    let device = open(&group, address).with_context(|| format!("open group {group}"))?;
    std::fs::write(ready, "")?;
    loop {
        std::thread::park();
        // Parking may end by itself.
        let _ = device.as_raw_fd();
    }
}

fn open(group: &str, address: CString) -> Result<OwnedFd> {
    let node = |name: &str| {
        let path = format!("/dev/vfio/{name}");
        File::options()
            .read(true)
            .write(true)
            .open(&path)
            .context(path)
    };
    let (container, group) = (node("vfio")?, node(group)?);
    // SAFETY: each request has the argument that linux/vfio.h names: a pointer to a descriptor, a number, a string.
    unsafe {
        ioctl(
            &group,
            Setter::<SET_CONTAINER, RawFd>::new(container.as_raw_fd()),
        )?;
        ioctl(&container, IntegerSetter::<SET_IOMMU>::new_usize(TYPE_1_V2))?;
        Ok(ioctl(&group, GetDevice(address))?)
    }
}

/// `VFIO_GROUP_GET_DEVICE_FD`: takes a string, gives a descriptor.
struct GetDevice(CString);

// SAFETY: the pointer is that of a string with its end, which lives as long as the request, and is only read.
unsafe impl Ioctl for GetDevice {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        GET_DEVICE_FD
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_ptr().cast_mut().cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _argument: *mut c_void,
    ) -> std::result::Result<OwnedFd, Errno> {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}
