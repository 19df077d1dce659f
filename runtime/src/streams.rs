//! Standard streams of a process elsewhere: FIFOs in a private directory, which a shim opens as well.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use katana_protocol::manage::exec::Size;
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::terminal::{self, Raw};

/// This host refuses a stream.
#[derive(Debug, thiserror::Error)]
#[error("{0}: {1}")]
pub struct Error(String, io::Error);

/// A stream to the process.
pub struct Input {
    /// Its name for the shim.
    pub path: String,
    /// Where to write; the process reads the end once this is closed.
    pub writer: File,
    /// What is written is not lost if the shim opens the FIFO later than `writer` is closed.
    pub keep: File,
}

/// A stream of the process.
pub struct Output {
    /// Its name for the shim.
    pub path: String,
    /// Where to read. The end comes when `keep` is closed, and the shim's side.
    pub reader: File,
    /// Keeps `reader` from reading the end before the shim has opened the FIFO.
    pub keep: File,
}

impl Input {
    /// In this directory.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = fifo(directory, "stdin")?;
        let keep = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let keep = keep.map_err(failed(&path))?;
        let writer = File::options().write(true).open(&path).map_err(failed(&path))?;
        Ok(Self { path: path.display().to_string(), writer, keep })
    }
}

impl Output {
    /// In this directory, under this name.
    pub fn open(directory: &Path, name: &str) -> Result<Self, Error> {
        let path = fifo(directory, name)?;
        let keep = File::options().read(true).write(true).open(&path).map_err(failed(&path))?;
        let reader = File::open(&path).map_err(failed(&path))?;
        Ok(Self { path: path.display().to_string(), reader, keep })
    }
}

fn fifo(directory: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = directory.join(name);
    mkfifo(&path, Mode::from_bits_truncate(0o600)).map_err(failed(&path))?;
    Ok(path)
}

fn failed<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> Error {
    move |e| Error(path.display().to_string(), e.into())
}

/// The streams of a process that has this program's own ones.
pub struct Attached {
    /// Where it reads, if it does.
    pub stdin: Option<Input>,
    /// Where it writes.
    pub stdout: Output,
    /// The same; a terminal has one for both.
    pub stderr: Option<Output>,
}

impl Attached {
    /// In this directory.
    pub fn open(directory: &Path, reads: bool, terminal: bool) -> Result<Self, Error> {
        Ok(Self {
            stdin: reads.then(|| Input::open(directory)).transpose()?,
            stdout: Output::open(directory, "stdout")?,
            stderr: (!terminal).then(|| Output::open(directory, "stderr")).transpose()?,
        })
    }

    /// Copies while the process runs, and what is left then. On a terminal each key goes to the process, and `resized`
    /// hears of its size.
    ///
    /// # Errors
    /// When the output cannot be written; then the process is not followed to its end.
    pub async fn follow<T, E>(
        self,
        process: impl Future<Output = Result<T, E>>,
        resized: impl AsyncFn(Size),
    ) -> io::Result<Result<T, E>> {
        let terminal = self.stderr.is_none();
        let raw = terminal.then(Raw::begin).transpose()?;
        let _keep = self.stdin.map(|input| {
            // What the process does not read is nobody's.
            copy(io::stdin(), input.writer, |_| ());
            input.keep
        });
        let (broken, mut is_broken) = mpsc::unbounded_channel();
        let say = |broken: &UnboundedSender<_>| {
            let broken = broken.clone();
            move |e| drop(broken.send(e))
        };
        let mut kept = vec![self.stdout.keep];
        let mut copies = vec![copy(self.stdout.reader, io::stdout(), say(&broken))];
        if let Some(errors) = self.stderr {
            kept.push(errors.keep);
            copies.push(copy(errors.reader, io::stderr(), say(&broken)));
        }
        let ended = tokio::select! {
            ended = process => ended,
            Some(e) = is_broken.recv() => return Err(e),
            never = follow_size(resized), if terminal => never,
        };
        drop(kept);
        if ended.is_ok() {
            // The shim has handed over all of it.
            copies.into_iter().for_each(|copy| drop(copy.join()));
        }
        drop(raw);
        Ok(ended)
    }
}

/// Copies on a thread of its own, which ends with the program if it does not end before. What cannot be written is
/// passed on.
fn copy(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    failed: impl FnOnce(io::Error) + Send + 'static,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 32 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let bytes = buffer.get(..length).unwrap_or_default();
            if let Err(e) = to.write_all(bytes).and_then(|()| to.flush()) {
                return failed(e);
            }
        }
    })
}

/// Follows the size of the terminal.
async fn follow_size<T>(resized: impl AsyncFn(Size)) -> T {
    if let Ok(mut changed) = signal(SignalKind::window_change()) {
        while changed.recv().await.is_some() {
            resized(terminal::size()).await;
        }
    }
    std::future::pending().await
}
