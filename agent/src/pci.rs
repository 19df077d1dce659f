//! The machine's virtio functions on the PCI bus, and their drivers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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
    const ALL: [Self; 2] = [Self::Nic, Self::Disk];

    fn number(self) -> &'static str {
        match self {
            Self::Nic => "0x1041",
            Self::Disk => "0x1042",
        }
    }
}

/// The function of this number among those of a kind.
pub fn function(kind: Kind, slot: u32) -> io::Result<PathBuf> {
    let mut of_kind = functions()?.iter().filter(|(other, _)| *other == kind);
    let (_, function) =
        of_kind.nth(usize::try_from(slot).unwrap_or(usize::MAX)).ok_or(io::ErrorKind::NotFound)?;
    Ok(function.clone())
}

/// Looks for all of them, ahead of the first that somebody asks for.
pub fn scan() -> io::Result<()> {
    functions().map(drop)
}

/// Those of each kind, in the order of their slots. No function comes or goes after the boot: slots are on the bus while
/// they are empty.
fn functions() -> io::Result<&'static [(Kind, PathBuf)]> {
    static FUNCTIONS: OnceLock<Vec<(Kind, PathBuf)>> = OnceLock::new();
    if let Some(functions) = FUNCTIONS.get() {
        return Ok(functions);
    }
    let is = |function: &Path, file, expected| {
        fs::read_to_string(function.join(file)).is_ok_and(|id| id.trim() == expected)
    };
    let mut functions = children(&Path::new(BUS).join("devices"))?;
    functions.retain(|function| is(function, "vendor", VENDOR));
    functions.sort();
    let kind = |function: &Path| Kind::ALL.into_iter().find(|kind| is(function, "device", kind.number()));
    let functions = functions.into_iter().filter_map(|function| Some((kind(&function)?, function)));
    Ok(FUNCTIONS.get_or_init(|| functions.collect()))
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
