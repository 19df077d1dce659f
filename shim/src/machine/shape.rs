//! A pod's virtual machine, and the files it is made of.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use katana_config::Config;
use katana_config::trusted::{self, Links};
use katana_protocol::vmm::Machine;

use crate::error::{Error, Result};

/// How an ELF file begins: System V ABI, chapter 4.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Magic of an erofs superblock, which starts at byte 1024.
const EROFS_MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// The machine for a pod that boots for itself, with the processors that it needs first, and slots for its network
/// NICs and disks. Memory for its limits is plugged, see [`crate::machine::size`].
pub fn machine(config: &Config, vcpus: u8, net_slots: u8, disk_slots: u8) -> Result<Machine> {
    let guest_cid = guest_cid()?;
    Ok(Machine { vcpus, net_slots, disk_slots, guest_cid, ..katana_template::machine(config) })
}

/// A vsock context id that no other guest has: nothing on the host goes by it, but software in guests may take it for
/// an identity. Those below 3 have meanings of their own, as has the last one.
fn guest_cid() -> Result<u32> {
    let [a, b, c, d] = crate::host::random()?;
    Ok(u32::from_le_bytes([a, b, c, d & 0x7f]).max(3))
}

/// What the VMM is given to boot from, in the order in which it expects them, the shared directory excepted. The VMM's
/// program is looked at as well: like these it must be root's alone, and then it stays what was looked at.
pub fn open_files(config: &Config) -> Result<[OwnedFd; 3]> {
    open("VMM", &config.hypervisor.path)?;
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| Error::io("open /dev/kvm", &e))?;
    let kernel = open("kernel", &config.hypervisor.kernel)?;
    expect_magic(&kernel, 0, ELF_MAGIC, "kernel", &config.hypervisor.kernel, "an ELF file (a vmlinux)")?;
    let image = open("guest image", &config.hypervisor.image)?;
    expect_magic(&image, 1024, EROFS_MAGIC, "guest image", &config.hypervisor.image, "an erofs image")?;
    Ok([kvm.into(), kernel.into(), image.into()])
}

/// The VMM does not know the names of the files it is given; the commonest mistakes are found here, by name.
fn expect_magic(
    file: &File,
    offset: u64,
    expected: [u8; 4],
    what: &str,
    path: &Path,
    kind: &str,
) -> Result<()> {
    let mut magic = [0; 4];
    if file.read_exact_at(&mut magic, offset).is_err() || magic != expected {
        return Err(Error::InvalidArgument(format!("{what} \"{}\" is not {kind}", path.display())));
    }
    Ok(())
}

fn open(what: &str, path: &Path) -> Result<File> {
    trusted::open(path, Links::Follow)
        .map_err(|e| Error::io(format_args!("{what} \"{}\"", path.display()), &e))
}
