//! Events of the kernel about devices (netlink(7), `NETLINK_KOBJECT_UEVENT`): the socket, and what its messages say.
//!
//! A message is a header `ACTION@DEVPATH` and then `KEY=VALUE`, each ended by a zero byte (Linux, lib/kobject_uevent.c). Only the
//! kernel may be believed: it sends with port 0.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use km_vfio::Address;
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};

/// The kernel's own messages (group 2 is udev's).
const KERNEL: u32 = 1;

/// The most that is read of a message, in bytes: the kernel's `UEVENT_BUFFER_SIZE` is 2 KiB, and the header comes on top.
pub const LONGEST: usize = 8192;

/// What an event says, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Something about a PCI function or a VFIO node changed: it is time to look.
    Look,
    /// The kernel has brought a function back after an error (drivers/pci/pci-driver.c, `pci_uevent_ers`).
    Recovered(Address),
}

/// Reads a message; `None` when it is about something else, or no message at all.
pub fn parse(message: &[u8]) -> Option<Told> {
    let mut parts = message.split(|byte| *byte == 0);
    let header = std::str::from_utf8(parts.next()?).ok()?;
    let (_, path) = header.split_once('@')?;
    let (mut ours, mut recovered) = (false, false);
    for part in parts {
        match part {
            b"SUBSYSTEM=pci" | b"SUBSYSTEM=vfio" | b"SUBSYSTEM=vfio-dev" => ours = true,
            b"ERROR_EVENT=SUCCESSFUL_RECOVERY" => recovered = true,
            _ => {}
        }
    }
    if !ours {
        return None;
    }
    let address = path.rsplit('/').next().and_then(|name| name.parse().ok());
    match address.filter(|_| recovered) {
        Some(address) => Some(Told::Recovered(address)),
        None => Some(Told::Look),
    }
}

/// The socket.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

/// What was read until nothing was left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// Whether it is time to look; also when messages were lost.
    pub(crate) look: bool,
    /// The functions that the kernel has recovered.
    pub(crate) recovered: Vec<Address>,
}

impl Uevents {
    pub(crate) fn open() -> io::Result<Uevents> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            flags,
            Some(KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
        Ok(Uevents(socket))
    }

    /// Reads all that is there; never waits.
    pub(crate) fn drain(&self) -> io::Result<Heard> {
        let mut heard = Heard::default();
        let mut buffer = [0; LONGEST];
        loop {
            match recvfrom(&self.0, buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((length, _, from)) => {
                    let from = from.and_then(|from| SocketAddrNetlink::try_from(from).ok());
                    if from.is_none_or(|from| from.pid() != 0) {
                        continue;
                    }
                    match parse(&buffer[..length]) {
                        Some(Told::Look) => heard.look = true,
                        Some(Told::Recovered(address)) => {
                            heard.look = true;
                            heard.recovered.push(address);
                        }
                        None => {}
                    }
                }
                // The queue ran over: what was lost may have been about us.
                Err(Errno::NOBUFS) => heard.look = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(heard),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(header: &str, pairs: &[&str]) -> Vec<u8> {
        let mut bytes = header.as_bytes().to_vec();
        for pair in pairs {
            bytes.push(0);
            bytes.extend_from_slice(pair.as_bytes());
        }
        bytes.push(0);
        bytes
    }

    #[test]
    fn what_is_about_pci_and_vfio_is_looked_at() {
        let path = "remove@/devices/pci0000:00/0000:00:10.0/0000:01:00.0";
        let pci = message(path, &["ACTION=remove", "SUBSYSTEM=pci", "SEQNUM=1"]);
        assert_eq!(parse(&pci), Some(Told::Look));
        let group = message("add@/devices/virtual/vfio/12", &["SUBSYSTEM=vfio"]);
        assert_eq!(parse(&group), Some(Told::Look));
        let net = message("add@/devices/virtual/net/veth1", &["SUBSYSTEM=net"]);
        assert_eq!(parse(&net), None);
        let lie = message("add@/SUBSYSTEM=pci", &["X=SUBSYSTEM=pci"]);
        assert_eq!(parse(&lie), None);
        let udev = [b"libudev\0\xfe\xed\xca\xfe".as_slice(), b"SUBSYSTEM=pci\0"].concat();
        assert_eq!(parse(&udev), None);
    }

    #[test]
    fn a_recovery_names_its_function() {
        let path = "change@/devices/pci0000:00/0000:00:10.0/0000:01:00.0";
        let pairs = [
            "SUBSYSTEM=pci",
            "ERROR_EVENT=SUCCESSFUL_RECOVERY",
            "DEVICE_ONLINE=1",
        ];
        let address = "0000:01:00.0".parse().unwrap();
        assert_eq!(
            parse(&message(path, &pairs)),
            Some(Told::Recovered(address))
        );
        let pairs = [
            "SUBSYSTEM=pci",
            "ERROR_EVENT=FAILED_RECOVERY",
            "DEVICE_ONLINE=0",
        ];
        assert_eq!(parse(&message(path, &pairs)), Some(Told::Look));
        let pairs = ["SUBSYSTEM=pci", "ERROR_EVENT=SUCCESSFUL_RECOVERY"];
        assert_eq!(
            parse(&message("change@/devices/x", &pairs)),
            Some(Told::Look)
        );
    }

    #[test]
    fn the_socket_opens_and_is_quiet() {
        let uevents = Uevents::open().unwrap();
        assert!(uevents.drain().is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            parse(&bytes);
        }
    }
}
