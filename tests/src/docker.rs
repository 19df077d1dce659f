//! Docker, with a daemon of the tests' own beside their containerd.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::Signal;

use crate::command::{Command, Output, Running};
use crate::container::ctr;
use crate::{BUSYBOX, Containerd, Scratch, environment, host};

static DAEMON: Mutex<Option<Arc<Docker>>> = Mutex::new(None);

/// What docs/docker.md has users put into /etc/docker/daemon.json.
const CONFIGURATION: &str = include_str!("../../config/docker-daemon.json");

/// A daemon that knows the image [`BUSYBOX`]. It ends with the tests.
pub struct Docker {
    socket: String,
    daemon: Mutex<Option<Running>>,
    scratch: Scratch,
}

impl Docker {
    /// The daemon, started for the first test that asks. Nothing where there is none, which is said then.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn get() -> Option<Arc<Self>> {
        extern "C" fn stop() {
            drop(DAEMON.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
        if !Path::new("/etc/katana-test-machine").exists() {
            environment::say_skipped(
                "Docker's daemon sets up packet filters, which is done in the test machine only",
            );
            return None;
        }
        let mut daemon = DAEMON.lock().unwrap_or_else(PoisonError::into_inner);
        if daemon.is_none() {
            // Statics are not dropped.
            // SAFETY: the function is safe to call at exit: it takes a lock that nobody holds for long, and ends a
            // process.
            unsafe { libc::atexit(stop) };
            *daemon = Some(Arc::new(Self::start()));
        }
        daemon.clone()
    }

    #[track_caller]
    fn start() -> Self {
        let scratch = Scratch::new();
        let configuration = scratch.file("daemon.json", CONFIGURATION).display().to_string();
        let path = |name: &str| scratch.path().join(name).display().to_string();
        let socket = format!("unix://{}", path("socket"));
        let containerd = Containerd::current().address().display().to_string();
        let words = [
            "dockerd",
            "--config-file",
            &configuration,
            "--containerd",
            &containerd,
            "--host",
            &socket,
            "--pidfile",
            &path("pid"),
            "--exec-root",
            &path("exec"),
            "--data-root",
            &path("data"),
        ];
        let daemon = Command::new(&words).patiently().spawn();
        let docker = Self { socket, daemon: Mutex::new(Some(daemon)), scratch };
        let image = docker.scratch.path().join("image.tar").display().to_string();
        ctr(&["images", "export", &image, BUSYBOX]).output().ok();
        assert!(
            host::eventually(|| docker.command("version", &[]).output().code == 0),
            "dockerd does not answer"
        );
        docker.run("load --input", &[&image]);
        // Directories that containerd keeps for Docker's namespace are there from now on.
        docker.run(&format!("run --rm {BUSYBOX} true"), &[]);
        docker
    }

    /// Its address, as `DOCKER_HOST` has it.
    pub fn host(&self) -> &str {
        &self.socket
    }

    /// `docker`, with options that are separated by white space and further words.
    pub fn command(&self, options: &str, words: &[&str]) -> Command {
        let start = ["docker", "--host", &self.socket];
        let options: Vec<&str> = options.split_whitespace().collect();
        Command::new(&[&start[..], &options, words].concat())
    }

    /// Runs such a command, which has to succeed.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn run(&self, options: &str, words: &[&str]) -> Output {
        self.command(options, words).output().ok()
    }

    /// A member of what `docker inspect` prints, such as `.State.Status`.
    #[track_caller]
    pub fn inspect(&self, name: &str, member: &str) -> String {
        let output = self.run("inspect --format", &[&format!("{{{{{member}}}}}"), name]);
        output.text().trim().to_owned()
    }

    /// A container, known by its name: it is removed when this is dropped.
    pub fn container(self: &Arc<Self>, name: &str) -> Removed {
        Removed { docker: Arc::clone(self), what: "rm --force --volumes", name: name.to_owned() }
    }

    /// A network, made now: it is removed when this is dropped.
    #[track_caller]
    pub fn network(self: &Arc<Self>, name: &str) -> Removed {
        self.run("network create", &[name]);
        Removed { docker: Arc::clone(self), what: "network rm", name: name.to_owned() }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.lock().unwrap_or_else(PoisonError::into_inner).take() {
            daemon.signal(Signal::SIGTERM);
            daemon.finish();
        }
    }
}

/// Something that Docker removes when this is dropped.
pub struct Removed {
    docker: Arc<Docker>,
    what: &'static str,
    name: String,
}

impl Drop for Removed {
    fn drop(&mut self) {
        // A test that fails must not hide its reason behind a second panic.
        let _ = self.docker.command(self.what, &[&self.name]).output();
    }
}
