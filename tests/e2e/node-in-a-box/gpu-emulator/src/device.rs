//! One function behind its vfio-user socket: requests of the virtual machine in, configuration space, registers, memory and
//! transfers out. The vfio-user protocol itself is the `vfio_user` crate's.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

use crate::config_space::{self, ConfigSpace, Effect};
use crate::dma::{Dma, Range};
use crate::journal::{Event, Journal, ResetKind};
use crate::memory::Memory;
use crate::registers::{self, Bus, RegisterModel, decode};
use crate::settings::{Device, Function};

/// What a device that is not there any more reads as.
const GONE: u8 = 0xff;

/// `EPERM`: a transfer while bus mastering is off.
const EPERM: u32 = 1;

/// Whether a device is dead, shared with the control socket.
#[derive(Clone, Debug)]
pub struct Life(Arc<AtomicBool>);

impl Life {
    /// A device that starts so.
    pub fn new(dead: bool) -> Self {
        Self(Arc::new(AtomicBool::new(dead)))
    }

    /// Whether it is dead.
    pub fn is_dead(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Kills or revives it.
    pub fn set_dead(&self, dead: bool) {
        self.0.store(dead, Ordering::SeqCst);
    }
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An old socket is in the way.
    #[error("device {0:?}: cannot remove the old socket {1}")]
    OldSocket(String, String, #[source] io::Error),
    /// The socket cannot be made.
    #[error("device {0:?}: cannot listen on {1}")]
    Listen(String, String, #[source] vfio_user::Error),
}

/// Serves one device for ever, one virtual machine at a time.
///
/// # Errors
/// When its socket cannot be made.
pub fn serve(device: &Device, life: Life, journal: Journal) -> Result<(), Error> {
    let (name, path) = (&device.name, device.socket.display().to_string());
    remove_socket(&device.socket)
        .map_err(|error| Error::OldSocket(name.clone(), path.clone(), error))?;
    let function = &device.function;
    let server = Server::new(
        &device.socket,
        true,
        interrupts(function),
        regions(function),
    )
    .map_err(|error| Error::Listen(name.clone(), path, error))?;
    journal.note(name, Event::Listening);
    loop {
        let mut emulated = Emulated::new(name, function, life.clone(), journal.clone());
        if let Err(error) = server.run(&mut emulated) {
            emulated.refuse(format!("the connection: {error}"));
        }
        journal.note(name, Event::Disconnected);
    }
}

/// Removes a socket of an earlier run. QEMU would wait for its dead server.
fn remove_socket(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn regions(function: &Function) -> Vec<ServerRegion> {
    let bars = function.bars();
    let size = |index| match index {
        VFIO_PCI_CONFIG_REGION_INDEX => config_space::SIZE as u64,
        _ => bars
            .iter()
            .find(|bar| u32::from(bar.index) == index)
            .map_or(0, |bar| bar.size),
    };
    let region = |index| {
        let flags = match size(index) {
            0 => 0,
            _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
        };
        ServerRegion {
            region_info: vfio_region_info {
                argsz: size_of::<vfio_region_info>() as u32,
                flags,
                index,
                cap_offset: 0,
                size: size(index),
                offset: 0,
            },
            sparse_areas: Vec::new(),
            // No access goes past the emulator, so each one can have an effect.
            mmap_fd: None,
        }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

fn interrupts(function: &Function) -> Vec<IrqInfo> {
    let of = |index| match index {
        VFIO_PCI_MSIX_IRQ_INDEX => IrqInfo {
            index,
            flags: VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
            count: u32::from(function.vectors()),
        },
        _ => IrqInfo {
            index,
            flags: 0,
            count: 0,
        },
    };
    (0..VFIO_PCI_NUM_IRQS).map(of).collect()
}

/// One function, as one virtual machine has it.
struct Emulated {
    name: String,
    function: Function,
    config: ConfigSpace,
    blocks: Vec<Box<dyn RegisterModel>>,
    bars: [Memory; 6],
    dma: Dma,
    vectors: Vec<Option<File>>,
    resets: u32,
    life: Life,
    journal: Journal,
}

impl Emulated {
    fn new(name: &str, function: &Function, life: Life, journal: Journal) -> Self {
        Self {
            name: name.to_owned(),
            function: function.clone(),
            config: ConfigSpace::new(function),
            blocks: registers::blocks(function),
            bars: Default::default(),
            dma: Dma::default(),
            vectors: Vec::new(),
            resets: 0,
            life,
            journal,
        }
    }

    fn note(&self, event: Event) {
        self.journal.note(&self.name, event);
    }

    fn refuse(&self, reason: String) {
        self.note(Event::Refused { reason });
    }

    /// Says in the journal what was refused; the crate tells the virtual machine.
    fn invalid(&self, reason: String) -> io::Error {
        self.refuse(reason.clone());
        io::Error::new(io::ErrorKind::InvalidInput, reason)
    }

    fn reset_by(&mut self, kind: ResetKind) {
        self.config = ConfigSpace::new(&self.function);
        self.bars.iter_mut().for_each(Memory::clear);
        for block in &mut self.blocks {
            block.reset(kind);
        }
        self.resets = self.resets.wrapping_add(1);
        self.note(Event::Reset {
            by: kind,
            count: self.resets,
        });
    }

    /// BAR 0 is registers first, and memory where there is none.
    fn read_registers(&mut self, offset: u64, data: &mut [u8]) {
        for (register, within, range) in decode(offset, data.len()) {
            let value = self
                .blocks
                .iter_mut()
                .find_map(|block| block.read(register));
            match value {
                Some(value) => {
                    let bytes = value.to_le_bytes();
                    let length = range.len();
                    data[range].copy_from_slice(&bytes[within..within + length]);
                    self.note(Event::Read {
                        offset: register,
                        value,
                    });
                }
                None => self.bars[0].read(register + within as u64, &mut data[range]),
            }
        }
    }

    /// A register takes whole writes alone: a part of one changes nothing, as the real ones do not take it either.
    fn write_registers(&mut self, offset: u64, data: &[u8]) -> bool {
        let mut kept = true;
        for (register, within, range) in decode(offset, data.len()) {
            let bytes = &data[range];
            let known = self
                .blocks
                .iter_mut()
                .position(|block| block.read(register).is_some());
            match (known, <[u8; 4]>::try_from(bytes)) {
                (Some(index), Ok(value)) => {
                    self.write_register(index, register, u32::from_le_bytes(value))
                }
                (Some(_), Err(_)) => kept = false,
                (None, _) => kept &= self.bars[0].write(register + within as u64, bytes),
            }
        }
        kept
    }

    fn write_register(&mut self, block: usize, offset: u64, value: u32) {
        self.note(Event::Write { offset, value });
        let mut bus = FunctionBus {
            name: &self.name,
            journal: &self.journal,
            dma: &self.dma,
            vectors: &self.vectors,
            master: self.config.bus_master(),
        };
        self.blocks[block].write(offset, value, &mut bus);
    }
}

/// What a register block reaches the virtual machine through.
struct FunctionBus<'a> {
    name: &'a str,
    journal: &'a Journal,
    dma: &'a Dma,
    vectors: &'a [Option<File>],
    master: bool,
}

impl FunctionBus<'_> {
    fn transferred(
        &self,
        address: u64,
        length: usize,
        write: bool,
        result: Result<(), u32>,
    ) -> Result<(), u32> {
        let event = Event::Transfer {
            address,
            length: u32::try_from(length).unwrap_or(u32::MAX),
            write,
            status: result.err().unwrap_or(0),
        };
        self.journal.note(self.name, event);
        result
    }
}

impl Bus for FunctionBus<'_> {
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), u32> {
        let result = match self.master {
            true => self.dma.read(address, data),
            false => Err(EPERM),
        };
        self.transferred(address, data.len(), false, result)
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), u32> {
        let result = match self.master {
            true => self.dma.write(address, data),
            false => Err(EPERM),
        };
        self.transferred(address, data.len(), true, result)
    }

    fn interrupt(&mut self, vector: u32) {
        let listener = usize::try_from(vector)
            .ok()
            .and_then(|index| self.vectors.get(index)?.as_ref());
        // An eventfd takes a number in the machine's own byte order (eventfd(2)).
        let delivered = self.master
            && listener.is_some_and(|mut file| file.write_all(&1_u64.to_ne_bytes()).is_ok());
        self.journal
            .note(self.name, Event::Interrupt { vector, delivered });
    }
}

impl ServerBackend for Emulated {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if self.life.is_dead() {
            data.fill(GONE);
            return Ok(());
        }
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => self
                .config
                .read(offset, data)
                .map_err(|error| self.invalid(error.to_string()))?,
            0 => self.read_registers(offset, data),
            1..=5 => self.bars[region as usize].read(offset, data),
            _ => return Err(self.invalid(format!("a read of region {region}"))),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.life.is_dead() {
            return Ok(());
        }
        let kept = match region {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let effect = self
                    .config
                    .write(offset, data)
                    .map_err(|error| self.invalid(error.to_string()))?;
                if effect == Effect::FunctionLevelReset {
                    self.reset_by(ResetKind::FunctionLevel);
                }
                true
            }
            0 => self.write_registers(offset, data),
            1..=5 => self.bars[region as usize].write(offset, data),
            _ => return Err(self.invalid(format!("a write to region {region}"))),
        };
        if !kept {
            self.refuse(format!(
                "a write to BAR {region} at {offset:#x} was dropped"
            ));
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        let range = Range {
            address,
            size,
            offset,
            readable: flags.contains(DmaMapFlags::READ),
            writable: flags.contains(DmaMapFlags::WRITE),
            file,
        };
        match self.dma.map(range) {
            true => Ok(()),
            false => Err(self.invalid(format!("mapping {size:#x} bytes at {address:#x}"))),
        }
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        match flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            true => self.dma.clear(),
            false => self.dma.unmap(address, size),
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        if !self.life.is_dead() {
            self.reset_by(ResetKind::Bus);
        }
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        files: Vec<File>,
    ) -> io::Result<()> {
        if index != VFIO_PCI_MSIX_IRQ_INDEX {
            return Ok(());
        }
        if count == 0 {
            self.vectors.clear();
            return Ok(());
        }
        let last = start.checked_add(count);
        if last.is_none_or(|last| last > u32::from(self.function.vectors())) {
            return Err(self.invalid(format!("{count} MSI-X vectors from {start}")));
        }
        self.vectors
            .resize_with(usize::from(self.function.vectors()), || None);
        if flags & VFIO_IRQ_SET_DATA_EVENTFD != 0 {
            let mut files = files.into_iter();
            for vector in start..start + count {
                self.vectors[vector as usize] = files.next();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Model;
    use crate::registers::bench;

    fn emulated(model: Model) -> Emulated {
        let function = Function::new(model);
        Emulated::new("it", &function, Life::new(false), Journal::new(io::sink()))
    }

    fn word(device: &mut Emulated, region: u32, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.region_read(region, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_dead_device_reads_as_ones_and_takes_no_write() {
        let mut device = emulated(Model::H100Pcie);
        device.region_write(0, 0x400, &7_u32.to_le_bytes()).unwrap();
        device.life.set_dead(true);
        assert_eq!(word(&mut device, 0, 0), u32::MAX);
        assert_eq!(word(&mut device, VFIO_PCI_CONFIG_REGION_INDEX, 0), u32::MAX);
        device.region_write(0, 0x400, &8_u32.to_le_bytes()).unwrap();
        device.reset().unwrap();
        device.life.set_dead(false);
        assert_eq!(word(&mut device, 0, 0x400), 7);
        assert_eq!(
            word(&mut device, VFIO_PCI_CONFIG_REGION_INDEX, 0),
            0x2331_10de
        );
    }

    #[test]
    fn both_resets_clear_memory_and_are_counted() {
        let mut device = emulated(Model::H100Sxm);
        for (count, flr) in [(1, true), (2, false)] {
            device.region_write(0, 0x400, &7_u32.to_le_bytes()).unwrap();
            match flr {
                true => device
                    .region_write(VFIO_PCI_CONFIG_REGION_INDEX, 0x80, &[0x10, 0xa9])
                    .unwrap(),
                false => device.reset().unwrap(),
            }
            assert_eq!(word(&mut device, 0, 0x400), 0);
            assert_eq!(word(&mut device, 0, bench::RESETS), count);
        }
    }

    #[test]
    fn a_transfer_needs_bus_mastering() {
        let mut device = emulated(Model::B200);
        let write = |device: &mut Emulated, offset, value: u32| {
            device
                .region_write(0, offset, &value.to_le_bytes())
                .unwrap();
        };
        write(&mut device, bench::LENGTH, 4);
        write(&mut device, bench::COMMAND, bench::FILL);
        assert_eq!(word(&mut device, 0, bench::STATUS), EPERM);
        device
            .region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[0x06, 0])
            .unwrap();
        write(&mut device, bench::COMMAND, bench::FILL);
        assert_eq!(word(&mut device, 0, bench::STATUS), crate::dma::EFAULT);
    }

    #[test]
    fn a_register_takes_whole_writes_and_gives_any_part() {
        let mut device = emulated(Model::Nvswitch);
        device.region_write(0, bench::LENGTH, &[9]).unwrap();
        assert_eq!(word(&mut device, 0, bench::LENGTH), 0);
        let mut part = [0; 2];
        device.region_read(0, 1, &mut part).unwrap();
        assert_eq!(part, [0x00, 0x70]);
    }

    proptest! {
        #[test]
        fn no_request_makes_it_panic(
            requests in prop::collection::vec((0_u32..12, any::<u64>(), 0_usize..20, any::<u8>()), 0..60),
        ) {
            let mut device = emulated(Model::H100Pcie);
            for (kind, offset, length, byte) in requests {
                let region = kind % 10;
                let near = if byte < 128 { offset % 4200 } else { offset };
                let mut data = vec![byte; length];
                let _ = device.region_write(region, near, &data);
                let _ = device.region_read(region, near, &mut data);
                let _ = device.set_irqs(kind % 4, u32::from(byte), offset as u32, length as u32, Vec::new());
                let _ = device.dma_map(DmaMapFlags::empty(), offset, near, offset >> 3, None);
            }
        }
    }
}
