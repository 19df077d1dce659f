//! The containerd that a test uses: the one that all share, or an instance of its own.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::Command;
use crate::cri;
use crate::host::eventually;
use crate::process::Process;

thread_local! {
    static CURRENT: RefCell<Option<Containerd>> = const { RefCell::new(None) };
}

/// Where a containerd has its socket and files.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Containerd(PathBuf);

impl Containerd {
    /// The one that this thread uses: see [`Containerd::enter`].
    ///
    /// # Panics
    /// When there is none: these tests never touch the machine's own containerd.
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone).unwrap_or_else(|| {
            let address = std::env::var_os("CONTAINERD_ADDRESS").map(PathBuf::from);
            let directory = address.as_deref().and_then(Path::parent);
            Self(
                directory
                    .expect("CONTAINERD_ADDRESS is not set: run this below tests/with-containerd")
                    .to_owned(),
            )
        })
    }

    /// Whatever this thread does goes to this one, until the result is dropped.
    pub fn enter(&self) -> Entered {
        Entered { before: CURRENT.replace(Some(self.clone())), thread: PhantomData }
    }

    /// The directory of all that it keeps while it runs.
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.0.join("containerd.sock")
    }

    /// Its configuration.
    pub fn configuration(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// The directory of images, snapshots and volumes.
    ///
    /// # Panics
    /// When the configuration does not say.
    pub fn root(&self) -> PathBuf {
        let text = std::fs::read_to_string(self.configuration()).expect("containerd's configuration");
        let line = text.lines().find_map(|line| line.strip_prefix("root = \"")?.strip_suffix('"'));
        line.expect("root in containerd's configuration").into()
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.0.join("containerd.log")
    }
}

/// See [`Containerd::enter`].
pub struct Entered {
    before: Option<Containerd>,
    /// It is of this thread.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.replace(self.before.take());
    }
}

/// The major version of a containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// The one that the other tests use.
    One,
    /// Of Debian sid.
    Two,
}

/// A containerd of a test's own, with busybox as its only image. It ends when this is dropped, with all that it runs.
pub struct Instance {
    number: String,
    containerd: Containerd,
}

impl Instance {
    /// Starts one.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn start(version: Version) -> Self {
        static NUMBER: AtomicU8 = AtomicU8::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed).to_string();
        let containerd = Containerd(PathBuf::from(format!("/run/katana-test-{number}")));
        let instance = Self { number, containerd };
        instance.run(version, "--start");
        instance
    }

    /// The one of version 2 for all tests that need nothing else. It lives until the tests end.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn of_version_2() -> Arc<Self> {
        extern "C" fn stop() {
            drop(SHARED.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
        static SHARED: Mutex<Option<Arc<Instance>>> = Mutex::new(None);
        static REGISTER: Once = Once::new();
        // Statics are not dropped.
        // SAFETY: the function is safe to call at exit: it takes a lock that nobody holds for long, and starts
        // processes.
        REGISTER.call_once(|| unsafe {
            libc::atexit(stop);
        });
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(shared.get_or_insert_with(|| Arc::new(Self::start(Version::Two))))
    }

    /// Where it is.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    #[track_caller]
    fn run(&self, version: Version, action: &str) {
        let script = std::env::var("KATANA_WITH_CONTAINERD").expect("KATANA_WITH_CONTAINERD is not set");
        let version = if version == Version::Two { "2" } else { "1" };
        Command::new(&[&script, "--instance", &self.number, "--containerd", version, action]).output().ok();
        assert!(eventually(|| cri::is_ready(&self.containerd)), "containerd does not answer kubelet");
    }

    /// Ends containerd by a signal; what it runs goes on.
    ///
    /// # Panics
    /// When it survives.
    #[track_caller]
    pub fn end(&self, signal: Signal) {
        let file = self.containerd.0.join("containerd.pid");
        let pid = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<i32>().ok());
        let pid = pid.unwrap_or_else(|| panic!("{} holds no process id", file.display()));
        let process =
            Process::all().into_iter().find(|process| process.pid == pid).expect("containerd's process");
        kill(Pid::from_raw(pid), signal).unwrap_or_else(|e| panic!("end containerd: {e}"));
        assert!(eventually(|| !process.lives()), "containerd survives");
    }

    /// Starts containerd again, of this version.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn restart(&self, version: Version) {
        self.run(version, "--restart");
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Nobody who waits for a test that failed wants to see this fail as well.
        let script = std::env::var("KATANA_WITH_CONTAINERD").unwrap_or_default();
        let _ = std::process::Command::new(script).args(["--instance", &self.number, "--stop"]).output();
    }
}
