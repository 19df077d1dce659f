//! `kata-runtime cp`: files from a container to this host, or the other way, as a tar stream. What comes from a container
//! is as little trusted as the container.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use clap::Args;
use katana_archive::{Manner, pack, unpack};
use katana_protocol::manage::exec::{Copy, Exec, Run};
use tokio::sync::oneshot;

use crate::session::{self, Session};
use crate::streams::{self, Input, Output};

/// The longest line that is shown of what the container's side says, bytes.
const LONGEST_LINE: u64 = 8192;
/// The most that is taken after the end of an archive, bytes: a record of tar(1).
const LONGEST_TAIL: u64 = 1 << 20;

/// Why not all is copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime cp: {0}")]
    Operands(&'static str),
    #[error("kata-runtime cp: {0}")]
    Session(#[from] session::Error),
    #[error("kata-runtime cp: {0}")]
    Stream(#[from] streams::Error),
    #[error("kata-runtime cp: {}", plain(&.0.to_string()))]
    Archive(#[from] katana_archive::Error),
    #[error("kata-runtime cp: {0}")]
    Host(#[from] io::Error),
    #[error("kata-runtime cp: {0}")]
    There(String),
    #[error("kata-runtime cp: it ended before all was copied")]
    Incomplete,
}

/// The options of `cp`.
#[derive(Args)]
pub struct Options {
    /// Keep owners and set-id bits
    #[arg(short, long)]
    archive: bool,
    /// Copy what the source leads to, if it is a link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// POD:PATH, POD/CONTAINER:PATH, a path of this host, or "-" for a tar archive on standard input
    source: String,
    /// Likewise; "-" is a tar archive on standard output
    destination: String,
}

/// An end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Here(&'a str),
    There { pod: &'a str, container: Option<&'a str>, path: &'a str },
}

impl<'a> Place<'a> {
    /// What begins as a path is one, whatever is in it.
    fn of(text: &'a str) -> Self {
        let is_path = text.starts_with('/') || text.starts_with('.');
        match text.split_once(':') {
            Some((name, path)) if !is_path => {
                let (pod, container) =
                    name.split_once('/').map_or((name, None), |(pod, container)| (pod, Some(container)));
                Self::There { pod, container, path }
            }
            _ => Self::Here(text),
        }
    }
}

/// Copies.
pub fn run(options: &Options) -> Result<(), Error> {
    match (Place::of(&options.source), Place::of(&options.destination)) {
        (Place::There { pod, container, path }, Place::Here(to)) => {
            if to == "-" && io::stdout().is_terminal() {
                return Err(Error::Operands("a tar archive is not written to a terminal"));
            }
            let copy = Copy::Out { path: absolute(path)?, follow: options.follow_link };
            crate::block_on(out(pod, container, copy, to, options.archive))?
        }
        (Place::Here(from), Place::There { pod, container, path }) => {
            let copy = Copy::In { path: absolute(path)?, archive: from == "-", keeps: options.archive };
            crate::block_on(into(pod, container, copy, from, options.follow_link))?
        }
        (Place::Here(_), Place::Here(_)) => {
            Err(Error::Operands("one of SOURCE and DESTINATION has to be POD:PATH or POD/CONTAINER:PATH"))
        }
        _ => Err(Error::Operands("files are not copied from container to container")),
    }
}

/// Paths of a container are relative to its root, as with Docker.
fn absolute(path: &str) -> Result<String, Error> {
    match path {
        "" => Err(Error::Operands("the path in the container is empty")),
        path if path.starts_with('/') => Ok(path.to_owned()),
        path => Ok(format!("/{path}")),
    }
}

async fn open(pod: &str, container: Option<&str>) -> Result<(Session, String), Error> {
    let (pod, containers) = session::find(pod).await?;
    let container = session::choose(&pod.id, &containers, container)?;
    Ok((Session::open(pod)?, container))
}

async fn out(pod: &str, container: Option<&str>, copy: Copy, to: &str, keeps: bool) -> Result<(), Error> {
    let (session, container) = open(pod, container).await?;
    let output = Output::open(session.directory(), "stdout")?;
    let (to, reader) = (PathBuf::from(to), output.reader);
    let here = on_thread(move || write_here(reader, &to, keeps));
    let streams = Streams { stdin: None, stdout: Some(output.path), kept: Some(output.keep) };
    beside(&session, container, copy, streams, here).await
}

async fn into(pod: &str, container: Option<&str>, copy: Copy, from: &str, follow: bool) -> Result<(), Error> {
    let from = PathBuf::from(from);
    if from != Path::new("-") {
        std::fs::symlink_metadata(&from)
            .map_err(|e| katana_archive::Error::File { path: from.clone(), source: e })?;
    }
    let (session, container) = open(pod, container).await?;
    let input = Input::open(session.directory())?;
    let writer = input.writer;
    let here = on_thread(move || read_here(&from, follow, writer));
    let streams = Streams { stdin: Some(input.path), stdout: None, kept: Some(input.keep) };
    beside(&session, container, copy, streams, here).await
}

/// The stream of a copy.
struct Streams {
    stdin: Option<String>,
    stdout: Option<String>,
    /// What keeps it open until the process has ended.
    kept: Option<File>,
}

/// Runs the process beside what happens to its stream here. If that fails, the process ends.
async fn beside(
    session: &Session,
    container: String,
    copy: Copy,
    streams: Streams,
    mut here: oneshot::Receiver<Result<(), Error>>,
) -> Result<(), Error> {
    let errors = Output::open(session.directory(), "stderr")?;
    let said = on_thread(move || show(errors.reader));
    let reads = streams.stdout.is_some();
    let exec = Exec {
        id: session.id.clone(),
        container: Some(container),
        run: Run::Copy(copy),
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: Some(errors.path),
    };
    let mut run = std::pin::pin!(session.run(&exec));
    let (status, rest) = tokio::select! {
        biased;
        done = &mut here => {
            done.unwrap_or(Ok(()))?;
            (run.await?, None)
        }
        status = &mut run => (status?, Some(here)),
    };
    drop((streams.kept, errors.keep));
    let last = said.await.unwrap_or_default();
    if status != 0 {
        return Err(last.map_or(Error::Incomplete, Error::There));
    }
    if let Some(line) = last {
        eprintln!("kata-runtime cp: {line}");
    }
    match rest {
        Some(here) if reads => here.await.unwrap_or(Ok(())),
        // It reads no further than to the end of the archive.
        _ => Ok(()),
    }
}

fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || drop(sender.send(work())));
    receiver
}

/// Takes the stream of a container.
fn write_here(mut stream: File, to: &Path, keeps: bool) -> Result<(), Error> {
    if to == Path::new("-") {
        let mut out = io::stdout().lock();
        io::copy(&mut stream, &mut out)?;
        return Ok(out.flush()?);
    }
    unpack(BufReader::with_capacity(64 * 1024, &stream), to, Manner { archive: false, keeps })?;
    // An archive ends with blocks that nobody needs.
    io::copy(&mut (&stream).take(LONGEST_TAIL), &mut io::sink())?;
    Ok(())
}

/// Makes the stream for a container.
fn read_here(from: &Path, follow: bool, mut stream: File) -> Result<(), Error> {
    if from == Path::new("-") {
        io::copy(&mut io::stdin().lock(), &mut stream)?;
        return Ok(());
    }
    let out = BufWriter::with_capacity(64 * 1024, stream);
    pack(from, follow, out, &mut |path, why| {
        eprintln!("kata-runtime cp: {}", plain(&format!("{}: {why}", path.display())));
    })?;
    Ok(())
}

/// Shows what the container's side says, but for the last line.
fn show(stream: File) -> Option<String> {
    let mut lines = BufReader::new(stream);
    let mut last: Option<String> = None;
    loop {
        let mut line = Vec::new();
        match (&mut lines).take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(1..) => {
                let line = plain(String::from_utf8_lossy(&line).trim_end());
                if let Some(before) = last.replace(line) {
                    eprintln!("kata-runtime cp: {before}");
                }
            }
            _ => return last,
        }
    }
}

/// For a terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_told_apart() {
        let there = |pod, container, path| Place::There { pod, container, path };
        assert_eq!(Place::of("pod:/etc"), there("pod", None, "/etc"));
        assert_eq!(Place::of("pod/box:etc/a:b"), there("pod", Some("box"), "etc/a:b"));
        for path in ["/a:b", "./a:b", "../a:b", "file", "-"] {
            assert_eq!(Place::of(path), Place::Here(path));
        }
        assert_eq!(absolute("etc/x").unwrap(), "/etc/x");
        assert!(absolute("").is_err());
    }

    #[test]
    fn what_a_container_says_is_only_text() {
        assert_eq!(plain("a\x1b[2J\u{9b}b"), "a?[2J?b");
    }
}
