//! Locks of files, which containers hold against each other.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

fn lock(how: FlockArg) -> Result<Flock<File>, nix::errno::Errno> {
    let directory = std::env::var(super::DIRECTORY).expect("this runs inside a container, for another test");
    let file = File::open(Path::new(&directory).join("file")).expect("open");
    Flock::lock(file, how).map_err(|(_, errno)| errno)
}

#[test]
#[ignore = "runs inside a container"]
fn it_is_locked_for_long() {
    let _lock = lock(FlockArg::LockExclusive).expect("lock");
    std::thread::sleep(Duration::from_secs(10_000));
}

#[test]
#[ignore = "runs inside a container"]
fn it_can_be_locked() {
    lock(FlockArg::LockSharedNonblock).expect("lock");
}
