//! What is in files: mappings, holes, synchronisation.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

use super::{Place, checked};

const PAGE: usize = 4096;

fn create(place: &Place, name: &str) -> File {
    OpenOptions::new().read(true).write(true).create_new(true).open(place.at(name)).expect("create")
}

/// A shared mapping of the whole file.
struct Mapping {
    start: std::ptr::NonNull<std::ffi::c_void>,
    length: usize,
}

impl Mapping {
    fn new(file: &File, length: usize) -> Self {
        let size = NonZeroUsize::new(length).expect("a length");
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: the kernel chooses the address; nobody else uses it.
        let start = unsafe { mmap(None, size, protection, flags, file, 0) }.expect("mmap");
        Self { start, length }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length, "outside of the mapping");
        // SAFETY: within the mapping, as was just checked.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.start.as_ptr().cast::<u8>().add(offset),
                bytes.len(),
            );
        }
    }

    fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= self.length, "outside of the mapping");
        let mut bytes = vec![0; length];
        // SAFETY: within the mapping, as was just checked.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start.as_ptr().cast::<u8>().add(offset),
                bytes.as_mut_ptr(),
                length,
            );
        }
        bytes
    }

    fn synchronise(&self) {
        // SAFETY: the whole mapping.
        unsafe { msync(self.start, self.length, MsFlags::MS_SYNC) }.expect("msync");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        unsafe { munmap(self.start, self.length) }.expect("munmap");
    }
}

#[test]
#[ignore = "runs inside a container"]
fn writes_through_a_shared_mapping() {
    let place = Place::new("mapping");
    let file = create(&place, "file");
    let length = 64 * PAGE;
    file.set_len(length as u64).expect("ftruncate");
    let mapping = Mapping::new(&file, length);
    mapping.write(PAGE - 3, b"across two pages");
    mapping.write(length - 3, b"end");
    mapping.synchronise();
    let mut found = [0; 16];
    file.read_exact_at(&mut found, PAGE as u64 - 3).expect("pread");
    assert_eq!(&found, b"across two pages");
    // Another open file sees it, and what is written with write(2) appears in the mapping.
    let other = OpenOptions::new().read(true).write(true).open(place.at("file")).expect("open");
    other.read_exact_at(&mut found[..3], length as u64 - 3).expect("pread");
    assert_eq!(&found[..3], b"end");
    other.write_all_at(b"from the other", 5 * PAGE as u64).expect("pwrite");
    assert_eq!(mapping.read(5 * PAGE, 14), b"from the other");
    drop(mapping);
    drop(file);
    assert_eq!(&fs::read(place.at("file")).expect("read")[length - 3..], b"end");
}

#[test]
#[ignore = "runs inside a container"]
fn two_mappings_of_one_file_are_one_memory() {
    let place = Place::new("two-mappings");
    let file = create(&place, "file");
    file.set_len(2 * PAGE as u64).expect("ftruncate");
    let other = OpenOptions::new().read(true).write(true).open(place.at("file")).expect("open");
    let (one, two) = (Mapping::new(&file, 2 * PAGE), Mapping::new(&other, 2 * PAGE));
    for round in 0..100_u8 {
        one.write(PAGE, &[round]);
        assert_eq!(two.read(PAGE, 1), [round]);
        two.write(7, &[round]);
        assert_eq!(one.read(7, 1), [round]);
    }
}

#[test]
#[ignore = "runs inside a container"]
fn synchronisation_succeeds() {
    let place = Place::new("sync");
    let mut file = create(&place, "file");
    file.write_all(&[1; 10_000]).expect("write");
    file.sync_data().expect("fdatasync");
    file.write_all(&[2; 10_000]).expect("write");
    file.sync_all().expect("fsync");
    File::open(&place.0).expect("open").sync_all().expect("fsync of the directory");
    let flags = libc::O_SYNC | libc::O_APPEND;
    let mut file =
        OpenOptions::new().append(true).custom_flags(flags).open(place.at("file")).expect("open O_SYNC");
    file.write_all(&[3; 10_000]).expect("write");
    // SAFETY: the descriptor is the file's.
    checked(unsafe { libc::syncfs(file.as_raw_fd()) }).expect("syncfs");
    let bytes = fs::read(place.at("file")).expect("read");
    assert_eq!((bytes.len(), bytes[9_999], bytes[10_000], bytes[29_999]), (30_000, 1, 2, 3));
}

#[test]
#[ignore = "runs inside a container"]
fn sparse_files_stay_sparse() {
    const GIB: u64 = 1 << 30;
    let place = Place::new("sparse");
    let mut file = create(&place, "file");
    file.write_all_at(b"end", 4 * GIB).expect("pwrite far away");
    let data = file.metadata().expect("fstat");
    assert_eq!(data.len(), 4 * GIB + 3);
    assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
    let mut hole = [1; 100];
    file.read_exact_at(&mut hole, GIB).expect("pread");
    assert_eq!(hole, [0; 100]);
    // A file system that knows its holes reports them; one that does not reports all as data. See lseek(2).
    // SAFETY: the descriptor is the file's.
    let next = checked(unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) }).expect("SEEK_DATA");
    assert!(next == 0 || next == 4 << 30, "the next data is at {next}");
    file.set_len(10).expect("ftruncate");
    file.seek(SeekFrom::Start(0)).expect("seek");
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).expect("read");
    assert_eq!(rest, [0; 10]);
}

#[test]
#[ignore = "runs inside a container"]
fn space_can_be_reserved_and_given_back() {
    let place = Place::new("allocate");
    let file = create(&place, "file");
    let fallocate = |mode, offset, length| {
        // SAFETY: the descriptor is the file's.
        checked(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) })
    };
    fallocate(0, 0, 1 << 20).expect("fallocate");
    let data = file.metadata().expect("fstat");
    assert_eq!((data.len(), data.blocks() >= 2048), (1 << 20, true));
    file.write_all_at(&[7; 3 * PAGE], 0).expect("pwrite");
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(punch, PAGE as i64, PAGE as i64).expect("punch a hole");
    let mut bytes = vec![1; 3 * PAGE];
    file.read_exact_at(&mut bytes, 0).expect("pread");
    assert!(bytes[..PAGE].iter().all(|&byte| byte == 7), "before the hole");
    assert!(bytes[PAGE..2 * PAGE].iter().all(|&byte| byte == 0), "the hole");
    assert!(bytes[2 * PAGE..].iter().all(|&byte| byte == 7), "behind the hole");
}

/// std::io::copy uses copy_file_range(2); sendfile(2) has its own way through the kernel.
#[test]
#[ignore = "runs inside a container"]
fn copies_inside_the_kernel() {
    let place = Place::new("copy");
    let content = katana_tests::scratch::noise(1_000_000, 3);
    fs::write(place.at("source"), &content).expect("write");
    fs::copy(place.at("source"), place.at("copy")).expect("copy");
    assert!(fs::read(place.at("copy")).expect("read") == content, "the copy differs");
    let (source, target) = (File::open(place.at("source")).expect("open"), create(&place, "sent"));
    let mut sent = 0;
    while sent < content.len() {
        // SAFETY: the descriptors are the files'; no offset is given.
        let count = unsafe {
            libc::sendfile(target.as_raw_fd(), source.as_raw_fd(), std::ptr::null_mut(), content.len())
        };
        let count = checked(i64::try_from(count).expect("a length")).expect("sendfile");
        assert!(count > 0, "sendfile ended after {sent} bytes");
        sent += usize::try_from(count).expect("a length");
    }
    assert!(fs::read(place.at("sent")).expect("read") == content, "what was sent differs");
}

/// A program can be written and run; while it runs, nobody may write to it: execve(2), ETXTBSY.
#[test]
#[ignore = "runs inside a container"]
fn a_program_can_be_written_and_run() {
    let place = Place::new("program");
    let program = place.at("program");
    fs::copy("/bin/sleep", &program).expect("copy");
    super::set_mode(&program, 0o755);
    let mut child = std::process::Command::new(&program).arg("100").spawn().expect("run it");
    let busy = super::errno(OpenOptions::new().write(true).open(&program));
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert_eq!(busy, libc::ETXTBSY);
}
