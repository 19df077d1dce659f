//! Files of huge pages, as databases and packet processors map them.

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::Path;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};

const HUGE: usize = 2 << 20;

/// Maps a new file of so many pages.
fn map(directory: &Path, pages: usize) -> nix::Result<*mut u8> {
    let file =
        File::options().read(true).write(true).create_new(true).open(directory.join(pages.to_string()));
    let (file, length) = (file.expect("make a file"), NonZeroUsize::new(pages * HUGE).expect("pages"));
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file, wherever there is room.
    let mapped = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    Ok(mapped.as_ptr().cast())
}

#[test]
#[ignore = "runs inside a container"]
fn two_can_be_used_and_no_more() {
    let directory = std::env::var(super::DIRECTORY).expect("this runs inside a container, for another test");
    let directory = Path::new(&directory);
    let pages = map(directory, 2).expect("map two pages");
    for offset in [0, HUGE, 2 * HUGE - 1] {
        // SAFETY: within the mapping, which nobody else uses.
        unsafe { pages.add(offset).write_volatile(7) };
    }
    // The kernel sets them aside for a mapping when that is made.
    map(directory, 8).expect_err("map more pages than there may be");
}
