//! Which tests may run at the same time: those that compare the whole host before and after, or disturb it, run alone.
//!
//! They run last. Tests that wait for their turn hold a thread of the test runner but no processor, so that `tests/run`
//! asks for more threads than tests run alone, and the others never stand still for one of these.
//!
//! How long each test took goes to `times` in `$KATANA_OUT`, so that what makes the suite slow can be found.

use std::io::Write;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

static RUNNING: Mutex<Running> = Mutex::new(Running { shared: 0, waiting: 0, alone: false });
static CHANGED: Condvar = Condvar::new();

/// The tests that run.
struct Running {
    /// How many run beside others.
    shared: usize,
    /// How many could run beside others if there were a processor for them.
    waiting: usize,
    /// Whether one runs alone.
    alone: bool,
}

/// A test's turn, until this is dropped.
pub struct Turn {
    start: Instant,
    alone: bool,
}

/// Beside others, as many as there are processors.
pub fn shared() -> Turn {
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    let mut running = lock();
    running.waiting += 1;
    let mut running = wait_while(running, |running| running.alone || running.shared >= most);
    running.waiting -= 1;
    running.shared += 1;
    Turn { start: Instant::now(), alone: false }
}

/// With nothing else going on.
pub fn alone() -> Turn {
    let busy = |running: &mut Running| running.alone || running.shared > 0 || running.waiting > 0;
    let mut running = wait_while(lock(), busy);
    running.alone = true;
    Turn { start: Instant::now(), alone: true }
}

/// A test that failed with it has left it as it is to be.
fn lock() -> MutexGuard<'static, Running> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_while(
    running: MutexGuard<'static, Running>,
    busy: impl FnMut(&mut Running) -> bool,
) -> MutexGuard<'static, Running> {
    CHANGED.wait_while(running, busy).unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Err(error) = self.note() {
            eprintln!("cannot note how long this took: {error}");
        }
        let mut running = lock();
        if self.alone {
            running.alone = false;
        } else {
            running.shared -= 1;
        }
        CHANGED.notify_all();
    }
}

impl Turn {
    fn note(&self) -> std::io::Result<()> {
        let Some(directory) = std::env::var_os("KATANA_OUT") else { return Ok(()) };
        // The test runner names a test's thread after the test, unless it runs one test at a time on its own thread.
        let thread = std::thread::current();
        let (time, name) = (self.start.elapsed().as_secs_f32(), thread.name().unwrap_or("?"));
        let how = if self.alone { " alone" } else { "" };
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(Path::new(&directory).join("times"))?;
        file.write_all(format!("{time:7.1} s {name}{how}\n").as_bytes())
    }
}
