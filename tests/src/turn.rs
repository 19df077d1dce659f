//! Which tests may run at the same time: those that compare the whole host before and after, or disturb it, run alone.
//!
//! How long each test took goes to `times` in `$KATANA_OUT`, so that what makes the suite slow can be found.

use std::io::Write;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

static TURN: RwLock<()> = RwLock::new(());

/// A test's turn, until this is dropped.
pub struct Turn<Guard> {
    start: Instant,
    _guard: Guard,
}

/// Beside others.
pub fn shared() -> Turn<RwLockReadGuard<'static, ()>> {
    Turn::new(TURN.read().unwrap_or_else(PoisonError::into_inner))
}

/// With nothing else going on.
pub fn alone() -> Turn<RwLockWriteGuard<'static, ()>> {
    Turn::new(TURN.write().unwrap_or_else(PoisonError::into_inner))
}

impl<Guard> Turn<Guard> {
    fn new(guard: Guard) -> Self {
        Self { start: Instant::now(), _guard: guard }
    }
}

impl<Guard> Drop for Turn<Guard> {
    fn drop(&mut self) {
        let Some(directory) = std::env::var_os("KATANA_OUT") else { return };
        // The test runner names a test's thread after the test, unless it runs one test at a time on its own thread.
        let thread = std::thread::current();
        let line = format!("{:7.1} s {}\n", self.start.elapsed().as_secs_f32(), thread.name().unwrap_or("?"));
        let file =
            std::fs::OpenOptions::new().create(true).append(true).open(Path::new(&directory).join("times"));
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            eprintln!("cannot note how long this took: {error}");
        }
    }
}
