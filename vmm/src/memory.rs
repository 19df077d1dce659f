//! The guest's memory: what lies where, and the mappings behind it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::ptr;

use vm_memory::{GuestAddress, GuestMemory as _};

/// Guest memory as every device sees it. The bitmap type is the one that virtiofsd's readers and writers ask
/// for; nothing is tracked with it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vhost_user_backend::bitmap::BitmapMmapRegion>;

/// Where low memory ends at the latest: the last GiB below 4 GiB belongs to devices and local APICs.
pub const HOLE: u64 = 0xc000_0000;
/// Where memory continues behind the hole.
pub const HIGH: u64 = 1 << 32;
/// The virtio devices' BARs.
pub const BARS: u64 = 0xe000_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The end of conventional memory; what follows belongs to the PC's BIOS.
pub const LOW_END: u64 = 0xa_0000;
/// The BIOS, of which only the MP table is there.
pub const BIOS: u64 = 0xf_0000;
/// Where memory continues behind the BIOS.
pub const ONE_MIB: u64 = 0x10_0000;

/// Granularity at which Linux takes persistent memory (sub-sections, mm/sparse.c) and KVM can use large pages.
const IMAGE_ALIGNMENT: u64 = 2 << 20;
/// Linux's memory sections: the image shares none with RAM.
const SECTION: u64 = 128 << 20;
/// Large guests have memory blocks of up to 2 GiB (arch/x86/mm/init_64.c).
const PLUGGABLE_ALIGNMENT: u64 = 2 << 30;
/// Enough to boot at all.
const SMALLEST_MIB: u64 = 32;
/// 1 TiB: below what 40 address bits of the oldest CPUs with KVM reach.
const LARGEST_MIB: u64 = 1 << 20;
/// An image larger than this is a mistake.
const LARGEST_IMAGE: u64 = 64 << 30;

/// Where an erofs superblock is, its first bytes, and the number of bits of a block's size in it (struct
/// erofs_super_block, fs/erofs/erofs_fs.h). The number of blocks follows last of what is read.
const EROFS_SUPERBLOCK: u64 = 1024;
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
const EROFS_BLOCK_BITS: usize = 12;
const EROFS_READ: usize = 40;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an amount that makes sense.
    #[error("guest memory: {0} MiB is not between {SMALLEST_MIB} MiB and 1 TiB")]
    Size(u64),
    /// The host refused.
    #[error("guest memory: {0}")]
    Ram(#[from] vm_memory::mmap::FromRangesError),
    /// The image's file cannot be used.
    #[error("guest image: {0}")]
    Image(io::Error),
    /// The image is empty or enormous.
    #[error("guest image: {0} bytes is not a plausible size")]
    ImageSize(u64),
    /// Something else than an image.
    #[error("guest image: not an erofs file system")]
    NotErofs,
    /// A download that did not end.
    #[error("guest image: cut: {is} of {should} bytes")]
    Cut {
        /// Bytes that there are.
        is: u64,
        /// Bytes according to the superblock.
        should: u64,
    },
}

/// Maps `mib` MiB of memory and what can be plugged later; pages come when they are touched.
///
/// # Errors
/// When the amount makes no sense or the host refuses.
pub fn create(mib: u64, pluggable: Option<Range>) -> Result<GuestMemory, Error> {
    let plugged = pluggable.map_or(0, |(_, size)| size >> 20);
    let total = mib.saturating_add(plugged);
    if mib < SMALLEST_MIB || total > LARGEST_MIB {
        return Err(Error::Size(total));
    }
    let ranges = ranges(mib << 20).chain(pluggable);
    let ranges: Vec<_> = ranges.map(|(start, size)| (GuestAddress(start), size as usize)).collect();
    Ok(GuestMemory::from_ranges(&ranges)?)
}

/// Start and size, bytes.
pub type Range = (u64, u64);

/// Memory that the guest gets and loses in pieces while it runs. What it does not have cannot be accessed, neither by
/// the guest nor by a device.
pub struct Pluggable {
    memory: GuestMemory,
    start: u64,
    size: u64,
}

impl Pluggable {
    /// Takes a whole range of `memory` from the guest.
    ///
    /// # Errors
    /// When the range is none of those that `memory` was made of, or the host refuses.
    pub fn new(memory: GuestMemory, (start, size): Range) -> io::Result<Self> {
        let pluggable = Self { memory, start, size };
        pluggable.shut(0, size)?;
        Ok(pluggable)
    }

    /// Where it begins for the guest.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gives the guest a piece, which is full of zeros.
    ///
    /// # Errors
    /// When the host has too many mappings.
    pub fn open(&self, offset: u64, length: u64) -> io::Result<()> {
        self.protect(offset, length, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Takes a piece back.
    ///
    /// # Errors
    /// When the host has too many mappings.
    pub fn shut(&self, offset: u64, length: u64) -> io::Result<()> {
        self.protect(offset, length, libc::PROT_NONE)?;
        let address = self.host(offset, length)?;
        // SAFETY: the range is guest memory, which holds no Rust objects.
        match unsafe { libc::madvise(address, length as usize, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn protect(&self, offset: u64, length: u64, protection: libc::c_int) -> io::Result<()> {
        let address = self.host(offset, length)?;
        // SAFETY: the range is guest memory, which holds no Rust objects and is only reached by checked pointers; an
        // access to what the guest does not have ends this process, as it should.
        match unsafe { libc::mprotect(address, length as usize, protection) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn host(&self, offset: u64, length: u64) -> io::Result<*mut libc::c_void> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
        let slice = self.memory.get_slice(GuestAddress(self.start + offset), length as usize);
        match slice {
            Ok(slice) if inside => Ok(slice.ptr_guard_mut().as_ptr().cast()),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

/// Start and size of each range of memory.
pub fn ranges(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = bytes.min(HOLE);
    [(0, low), (HIGH, bytes - low)].into_iter().filter(|(_, size)| *size > 0)
}

/// Where the guest image goes: above all memory.
pub fn image_address(mib: u64) -> u64 {
    let end = ranges(mib << 20).map(|(start, size)| start + size).max().unwrap_or(0);
    end.max(HIGH).next_multiple_of(SECTION)
}

/// Where memory to be plugged goes, which Linux takes in sections: above the image.
pub fn pluggable_range(mib: u64, image: u64, pluggable_mib: u64) -> Option<Range> {
    let size = (pluggable_mib << 20) / SECTION * SECTION;
    let start = (image_address(mib) + image).next_multiple_of(PLUGGABLE_ALIGNMENT);
    (size > 0).then_some((start, size))
}

/// A file in this process's memory, for good: mappings are never removed, since the guest runs on them.
pub struct Mapping {
    address: *mut u8,
    size: u64,
}

// SAFETY: a Mapping is only an address and a size; nothing in this process reads or writes through it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Where it is.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address
    }

    /// Bytes, a multiple of 2 MiB.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Maps the guest image, read-only and private, so that all VMs share the host's page cache of it.
///
/// # Errors
/// When it is no image or the host refuses.
pub fn map_image(image: &File) -> Result<Mapping, Error> {
    let length = image.metadata().map_err(Error::Image)?.len();
    let mut superblock = [0; EROFS_READ];
    match image.read_exact_at(&mut superblock, EROFS_SUPERBLOCK) {
        Ok(()) if superblock.starts_with(&EROFS_MAGIC) => {}
        Ok(()) => return Err(Error::NotErofs),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Error::ImageSize(length)),
        Err(error) => return Err(Error::Image(error)),
    }
    let blocks = superblock.last_chunk().map_or(0, |blocks| u64::from(u32::from_le_bytes(*blocks)));
    let should = blocks.checked_shl(u32::from(superblock[EROFS_BLOCK_BITS])).unwrap_or(u64::MAX);
    if length < should {
        return Err(Error::Cut { is: length, should });
    }
    if length > LARGEST_IMAGE {
        return Err(Error::ImageSize(length));
    }
    map_padded(image, length).map_err(Error::Image)
}

/// Maps a file at a 2 MiB boundary, followed by zeros up to the next one.
fn map_padded(file: &File, length: u64) -> io::Result<Mapping> {
    let size = length.next_multiple_of(IMAGE_ALIGNMENT);
    let reserve = (size + IMAGE_ALIGNMENT) as usize;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let base = unsafe { libc::mmap(ptr::null_mut(), reserve, libc::PROT_READ, anonymous, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let address = base.wrapping_byte_add(base.align_offset(IMAGE_ALIGNMENT as usize));
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the range lies inside the mapping just made, which nothing else uses yet.
    let mapped = unsafe { libc::mmap(address, length as usize, libc::PROT_READ, flags, fd, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(Mapping { address: address.cast(), size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn memory_leaves_the_hole_free() {
        let at = |mib: u64| ranges(mib << 20).collect::<Vec<_>>();
        assert_eq!(at(512), [(0, 512 << 20)]);
        assert_eq!(at(3072), [(0, HOLE)]);
        assert_eq!(at(3073), [(0, HOLE), (HIGH, 1 << 20)]);
        assert_eq!(image_address(512), HIGH);
        assert_eq!(image_address(3073), HIGH + SECTION);
        assert!(matches!(create(0, None), Err(Error::Size(0))));
        assert!(matches!(create(u64::MAX, None), Err(Error::Size(_))));
        assert_eq!(pluggable_range(512, 4 << 20, 300), Some((6 << 30, 256 << 20)));
        assert_eq!(pluggable_range(512, 4 << 20, 100), None);
    }

    #[test]
    fn what_is_not_plugged_is_not_there() {
        use std::os::fd::FromRawFd;
        use vm_memory::Bytes;

        let range = pluggable_range(64, 2 << 20, 128).unwrap();
        let memory = create(64, Some(range)).unwrap();
        let pluggable = Pluggable::new(memory.clone(), range).unwrap();
        let start = GuestAddress(range.0);
        pluggable.open(0, 4096).unwrap();
        memory.write_slice(&[1; 4096], start).unwrap();
        pluggable.shut(0, 4096).unwrap();
        // The kernel is asked, since an access of our own would end this process.
        let (mut ends, slice) = ([0; 2], memory.get_slice(start, 4096).unwrap());
        // SAFETY: `ends` has room for two descriptors, which nobody else knows.
        let [_read, write] = unsafe {
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            ends.map(|end| std::os::fd::OwnedFd::from_raw_fd(end))
        };
        // SAFETY: write checks that the memory can be read.
        let written = unsafe { libc::write(write.as_raw_fd(), slice.ptr_guard().as_ptr().cast(), 16) };
        assert_eq!((written, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
        pluggable.open(0, 4096).unwrap();
        assert_eq!(memory.read_obj::<u64>(start).unwrap(), 0);
        assert!(pluggable.open(range.1, 4096).is_err() && pluggable.open(range.1 - 4096, 8192).is_err());
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn an_image_is_mapped_with_its_end_padded() {
        let mut bytes = vec![7; 10_000];
        bytes[1024..1064].fill(0);
        bytes[1024..1028].copy_from_slice(&EROFS_MAGIC);
        let mapping = map_image(&file(&bytes)).unwrap();
        assert_eq!(mapping.size(), IMAGE_ALIGNMENT);
        assert_eq!(mapping.as_ptr() as u64 % IMAGE_ALIGNMENT, 0);
        // SAFETY: the mapping is there for good and only read.
        let mapped = unsafe { std::slice::from_raw_parts(mapping.as_ptr(), mapping.size() as usize) };
        assert_eq!(&mapped[..10_000], bytes);
        assert!(mapped[10_000..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_no_image_is_named() {
        assert!(matches!(map_image(&file(&[])), Err(Error::ImageSize(0))));
        assert!(matches!(map_image(&file(&[0; 4096])), Err(Error::NotErofs)));
        let mut cut = vec![0; 4096];
        cut[1024..1028].copy_from_slice(&EROFS_MAGIC);
        (cut[1024 + EROFS_BLOCK_BITS], cut[1024 + 36]) = (12, 2);
        assert!(matches!(map_image(&file(&cut)), Err(Error::Cut { is: 4096, should: 8192 })));
        cut[1024 + EROFS_BLOCK_BITS] = 0xff;
        assert!(matches!(map_image(&file(&cut)), Err(Error::Cut { should: u64::MAX, .. })));
    }
}
