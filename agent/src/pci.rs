//! The machine's virtio functions on the PCI bus, and their drivers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const BUS: &str = "/sys/bus/pci";
/// virtio 1.2, 4.1.2
const VENDOR: &str = "0x1af4";

/// Kinds of functions by their device numbers: virtio 1.2, 4.1.2 and 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A NIC.
    Nic,
    /// A disk.
    Disk,
}

impl Kind {
    fn number(self) -> &'static str {
        match self {
            Self::Nic => "0x1041",
            Self::Disk => "0x1042",
        }
    }
}

/// The function of this number among those of a kind.
pub fn function(kind: Kind, slot: u32) -> io::Result<PathBuf> {
    let is = |function: &Path, file, expected| {
        fs::read_to_string(function.join(file)).is_ok_and(|id| id.trim() == expected)
    };
    let mut functions = children(&Path::new(BUS).join("devices"))?;
    functions.retain(|function| is(function, "vendor", VENDOR) && is(function, "device", kind.number()));
    functions.sort();
    let slot = usize::try_from(slot).unwrap_or(usize::MAX);
    functions.into_iter().nth(slot).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// FUNCTION/virtioN/CLASS/NAME: what its driver made of it, if one has taken it.
pub fn made_of(function: &Path, class: &str) -> Option<PathBuf> {
    let is_virtio =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"virtio"));
    let device = children(function).ok()?.into_iter().find(is_virtio)?;
    children(&device.join(class)).ok()?.into_iter().next()
}

/// Has the kernel look for a driver: the function was empty when it looked the last time.
pub fn probe(function: &Path) -> io::Result<()> {
    fs::write(Path::new(BUS).join("drivers_probe"), address(function)?)
}

/// Takes the function away from its driver, if one has it.
pub fn unbind(function: &Path) -> io::Result<()> {
    match fs::write(function.join("driver/unbind"), address(function)?) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn address(function: &Path) -> io::Result<&[u8]> {
    Ok(function.file_name().ok_or(io::ErrorKind::InvalidInput)?.as_encoded_bytes())
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}
