//! An empty ext4 file system, written into a sparse file (Documentation/filesystems/ext4 of the Linux kernel).
//!
//! `mkfs.ext4` would cost more than the rest of a container's root, and its layout is for disks that last. This one has
//! what a new and short-lived file system needs: no copies of the superblock, no tables that are spread or kept in
//! reserve. Groups are marked as not used yet (`GDT_CSUM`), so that of a file of any size some ten blocks are written,
//! and the guest's kernel reads no more than these when it mounts it. What was never written reads as zero, which is
//! what an inode table has to begin with.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks of a group: as many as a block has bits.
const GROUP: u32 = 32768;
const INODE: usize = 256;
/// Bytes of the file system for each inode, as `mkfs.ext4` has it.
const BYTES_PER_INODE: u64 = 16384;
const MOST_INODES: u64 = GROUP as u64 * BLOCK as u64 / BYTES_PER_INODE;
/// Bytes of a group's descriptor.
const DESCRIPTOR: usize = 32;
/// Bytes of the smallest and of the largest one: there is room for the journal, and block numbers have 32 bits.
pub const LEAST: u64 = 16 << 20;
/// See [`LEAST`].
pub const MOST: u64 = 8 << 40;
/// Blocks of a journal: the least that jbd2 takes. All of them are written in time, and count as the container's.
const JOURNAL: u32 = 1024;
/// A last group with fewer blocks is left out.
const LEAST_OF_LAST: u32 = 1024;

/// Directories in it, and the inode of the first of them; `lost+found` is the first that is not reserved.
const DIRECTORIES: [&str; 3] = ["lost+found", UPPER, WORK];
const FIRST_INODE: u32 = 11;
const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
const USED_INODES: u32 = FIRST_INODE - 1 + DIRECTORIES.len() as u32;
/// The directory that is an overlay's upper one.
pub const UPPER: &str = "upper";
/// And the one that is its work directory.
pub const WORK: &str = "work";

const BLOCK_UNINIT: u16 = 2;
const INODE_UNINIT: u16 = 1;
const INODE_ZEROED: u16 = 4;
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;

/// Who may do what with the directory [`UPPER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: u16,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// The numbers of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    blocks: u32,
    groups: u32,
    inodes_per_group: u32,
    /// Blocks of its journal.
    journal: u32,
}

impl Shape {
    /// Of a file of so many bytes, not less than [`LEAST`] and not more than [`MOST`].
    fn of(bytes: u64, journal: bool) -> io::Result<Self> {
        if !(LEAST..=MOST).contains(&bytes) {
            let text = format!("a file system of {bytes} bytes: from {LEAST} to {MOST} are possible");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let blocks = u32::try_from(bytes / BLOCK as u64).unwrap_or(u32::MAX);
        let rest = blocks % GROUP;
        let blocks = if blocks > GROUP && rest < LEAST_OF_LAST { blocks - rest } else { blocks };
        // Whole blocks of inodes.
        let inodes = (bytes / BYTES_PER_INODE).min(MOST_INODES) / 16 * 16;
        let inodes_per_group = u32::try_from(inodes).unwrap_or(u32::MAX);
        let journal = if journal { JOURNAL } else { 0 };
        Ok(Self { blocks, groups: blocks.div_ceil(GROUP), inodes_per_group, journal })
    }

    fn descriptor_blocks(self) -> u32 {
        (self.groups * DESCRIPTOR as u32).div_ceil(BLOCK as u32)
    }

    fn table_blocks(self) -> u32 {
        self.inodes_per_group * INODE as u32 / BLOCK as u32
    }

    /// Where a group's own blocks begin: bitmap of blocks, bitmap of inodes, table of inodes.
    fn own(self, group: u32) -> u32 {
        if group == 0 { 1 + self.descriptor_blocks() } else { group * GROUP }
    }

    fn directories(self) -> u32 {
        self.own(0) + 2 + self.table_blocks()
    }

    fn journal_start(self) -> u32 {
        self.directories() + 1 + DIRECTORIES.len() as u32
    }

    fn blocks_of(self, group: u32) -> u32 {
        (self.blocks - group * GROUP).min(GROUP)
    }

    /// Blocks that are in use from the start, all at the beginning of their group.
    fn used(self, group: u32) -> u32 {
        if group == 0 { self.journal_start() + self.journal } else { 2 + self.table_blocks() }
    }

    fn free(self) -> u32 {
        (0..self.groups).map(|group| self.blocks_of(group) - self.used(group)).sum()
    }
}

/// Makes an empty file that large, as sparse as can be. `random` are its UUID and the seed of its hashes. Without a
/// journal it costs less to mount and to write to, and is of no use after a crash.
///
/// # Errors
/// When the size is impossible, or of the writes.
pub fn make(file: &File, bytes: u64, upper: Access, random: [u8; 32], journal: bool) -> io::Result<()> {
    let shape = Shape::of(bytes, journal)?;
    file.set_len(u64::from(shape.blocks) * BLOCK as u64)?;
    let at = |block: u32| u64::from(block) * BLOCK as u64;
    file.write_all_at(&head(shape, upper, &random), 0)?;
    file.write_all_at(&directories(shape), at(shape.directories()))?;
    let last = shape.groups - 1;
    if last > 0 {
        // That of the last group is to be there (e2fsck, "Last group block bitmap uninitialized").
        file.write_all_at(&bitmap(shape.used(last), shape.blocks_of(last)), at(shape.own(last)))?;
    }
    Ok(())
}

/// From the superblock to the first inodes.
fn head(shape: Shape, upper: Access, random: &[u8; 32]) -> Vec<u8> {
    let mut head = vec![0; 1024];
    head.extend(superblock(shape, random));
    head.resize(BLOCK, 0);
    for group in 0..shape.groups {
        head.extend(descriptor(shape, group, &random[..16]));
    }
    head.resize(shape.own(0) as usize * BLOCK, 0);
    head.extend(bitmap(shape.used(0), shape.blocks_of(0)));
    head.extend(bitmap(USED_INODES, shape.inodes_per_group));
    let table = head.len();
    head.resize(table + BLOCK, 0);
    let root = Access { mode: DIRECTORY | 0o755, uid: 0, gid: 0 };
    let mut inodes = vec![(ROOT_INODE, inode(root, 2 + DIRECTORIES.len() as u16, shape.directories(), 1))];
    if shape.journal > 0 {
        let access = Access { mode: REGULAR | 0o600, ..root };
        inodes.push((JOURNAL_INODE, inode(access, 1, shape.journal_start(), shape.journal)));
    }
    for ((number, name), block) in (FIRST_INODE..).zip(DIRECTORIES).zip(shape.directories() + 1..) {
        let access = if name == UPPER { upper } else { Access { mode: 0o700, ..root } };
        let access = Access { mode: DIRECTORY | access.mode & 0o7777, ..access };
        inodes.push((number, inode(access, 2, block, 1)));
    }
    for (number, inode) in inodes {
        put(&mut head, table + (number as usize - 1) * INODE, &inode);
    }
    head
}

fn superblock(shape: Shape, random: &[u8; 32]) -> Vec<u8> {
    let mut block = vec![0; 1024];
    let inodes = shape.inodes_per_group * shape.groups;
    let words: [(usize, u32); 22] = [
        (0x00, inodes),
        (0x04, shape.blocks),
        (0x0c, shape.free()),
        (0x10, inodes - USED_INODES),
        // Sizes of blocks and clusters, as powers of two above 1024.
        (0x18, 2),
        (0x1c, 2),
        (0x20, GROUP),
        (0x24, GROUP),
        (0x28, shape.inodes_per_group),
        // No check after so many mounts; magic; clean, and read-only after an error.
        (0x34, 0xffff << 16),
        (0x38, 0xef53 | 1 << 16),
        (0x3c, 2),
        // Revision 1.
        (0x4c, 1),
        (0x54, FIRST_INODE),
        (0x58, INODE as u32),
        // HAS_JOURNAL, EXT_ATTR, DIR_INDEX, SPARSE_SUPER2, whose list of copies of the superblock is empty.
        (0x5c, u32::from(shape.journal > 0) << 2 | 0x8 | 0x20 | 0x200),
        // FILETYPE, EXTENTS.
        (0x60, 0x2 | 0x40),
        // LARGE_FILE, HUGE_FILE, GDT_CSUM, DIR_NLINK, EXTRA_ISIZE.
        (0x64, 0x2 | 0x8 | 0x10 | 0x20 | 0x40),
        (0xe0, if shape.journal > 0 { JOURNAL_INODE } else { 0 }),
        // Mounted with user_xattr and acl.
        (0x100, 0x4 | 0x8),
        // Sizes of the later part of an inode: least and wanted.
        (0x15c, 32 | 32 << 16),
        // Directory hashes take bytes as signed.
        (0x160, 1),
    ];
    for (offset, word) in words {
        put(&mut block, offset, &word.to_le_bytes());
    }
    put(&mut block, 0x68, &random[..16]);
    put(&mut block, 0xec, &random[16..]);
    // Half MD4.
    put(&mut block, 0xfc, &[1]);
    block
}

fn descriptor(shape: Shape, group: u32, uuid: &[u8]) -> Vec<u8> {
    let own = shape.own(group);
    let used = if group == 0 { USED_INODES } else { 0 };
    let flags = match group {
        0 => INODE_ZEROED,
        _ if group + 1 == shape.groups => INODE_ZEROED | INODE_UNINIT,
        _ => INODE_ZEROED | INODE_UNINIT | BLOCK_UNINIT,
    };
    let directories = if group == 0 { 1 + DIRECTORIES.len() as u16 } else { 0 };
    let free = (shape.inodes_per_group - used) as u16;
    let mut bytes = vec![0; DESCRIPTOR];
    put(&mut bytes, 0x0, &own.to_le_bytes());
    put(&mut bytes, 0x4, &(own + 1).to_le_bytes());
    put(&mut bytes, 0x8, &(own + 2).to_le_bytes());
    put(&mut bytes, 0xc, &((shape.blocks_of(group) - shape.used(group)) as u16).to_le_bytes());
    put(&mut bytes, 0xe, &free.to_le_bytes());
    put(&mut bytes, 0x10, &directories.to_le_bytes());
    put(&mut bytes, 0x12, &flags.to_le_bytes());
    put(&mut bytes, 0x1c, &free.to_le_bytes());
    let checksum = [uuid, &group.to_le_bytes(), &bytes[..0x1e]].into_iter().fold(0xffff, crc16);
    put(&mut bytes, 0x1e, &checksum.to_le_bytes());
    bytes
}

/// The first `used` of so many are in use, and so is what is not there.
fn bitmap(used: u32, of: u32) -> Vec<u8> {
    let mut bits = vec![0_u8; BLOCK];
    let mut set = |bit: u32| bits[bit as usize / 8] |= 1 << (bit % 8);
    (0..used).chain(of..GROUP).for_each(&mut set);
    bits
}

/// A file or directory of one extent.
fn inode(access: Access, links: u16, start: u32, blocks: u32) -> Vec<u8> {
    let Access { mode, uid, gid } = access;
    let mut bytes = vec![0; INODE];
    put(&mut bytes, 0x00, &mode.to_le_bytes());
    put(&mut bytes, 0x02, &(uid as u16).to_le_bytes());
    put(&mut bytes, 0x04, &(blocks * BLOCK as u32).to_le_bytes());
    put(&mut bytes, 0x18, &(gid as u16).to_le_bytes());
    put(&mut bytes, 0x1a, &links.to_le_bytes());
    put(&mut bytes, 0x1c, &(blocks * (BLOCK / 512) as u32).to_le_bytes());
    // EXTENTS_FL.
    put(&mut bytes, 0x20, &0x80000_u32.to_le_bytes());
    // The head of a tree of extents: magic, one entry of four, no levels below.
    put(&mut bytes, 0x28, &0xf30a_u16.to_le_bytes());
    put(&mut bytes, 0x2a, &1_u16.to_le_bytes());
    put(&mut bytes, 0x2c, &4_u16.to_le_bytes());
    put(&mut bytes, 0x38, &(blocks as u16).to_le_bytes());
    put(&mut bytes, 0x3c, &start.to_le_bytes());
    put(&mut bytes, 0x78, &((uid >> 16) as u16).to_le_bytes());
    put(&mut bytes, 0x7a, &((gid >> 16) as u16).to_le_bytes());
    put(&mut bytes, 0x80, &32_u16.to_le_bytes());
    bytes
}

/// The root directory, those in it, and the first block of the journal.
fn directories(shape: Shape) -> Vec<u8> {
    let names = (FIRST_INODE..).zip(DIRECTORIES);
    let mut blocks = directory(
        &[(ROOT_INODE, "."), (ROOT_INODE, "..")].into_iter().chain(names.clone()).collect::<Vec<_>>(),
    );
    for (number, _) in names {
        blocks.extend(directory(&[(number, "."), (ROOT_INODE, "..")]));
    }
    if shape.journal == 0 {
        return blocks;
    }
    // A journal of version 2 in big-endian numbers: magic and kind of block, sizes, first block and first transaction;
    // it is empty, and one file system uses it.
    let journal = blocks.len();
    blocks.resize(journal + BLOCK, 0);
    let words = [
        (0, 0xc03b_3998),
        (4, 4),
        (0xc, BLOCK as u32),
        (0x10, shape.journal),
        (0x14, 1),
        (0x18, 1),
        (0x40, 1),
    ];
    for (offset, word) in words {
        put(&mut blocks, journal + offset, &u32::to_be_bytes(word));
    }
    blocks
}

fn directory(entries: &[(u32, &str)]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    for (number, (inode, name)) in entries.iter().enumerate() {
        let length = (8 + name.len()).next_multiple_of(4);
        let is_last = number + 1 == entries.len();
        let length = if is_last { BLOCK - block.len() } else { length };
        let start = block.len();
        block.extend(inode.to_le_bytes());
        block.extend((length as u16).to_le_bytes());
        // A directory.
        block.extend([name.len() as u8, 2]);
        block.extend(name.as_bytes());
        block.resize(start + length, 0);
    }
    block
}

fn put(block: &mut [u8], offset: usize, bytes: &[u8]) {
    block.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
}

/// CRC-16 as in lib/crc16.c of the kernel: polynomial 0x8005, bits reversed.
fn crc16(sum: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(sum, |sum, byte| {
        (0..8).fold(sum ^ u16::from(*byte), |sum, _| if sum & 1 == 0 { sum >> 1 } else { sum >> 1 ^ 0xa001 })
    })
}

#[cfg(test)]
#[path = "ext4/tests.rs"]
mod tests;
