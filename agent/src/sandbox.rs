//! The pod: what is set once for the guest, and the table of containers.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use katana_protocol::agent::{Change, Network, SharedMount};
use katana_protocol::{GUEST_SHARE, GUEST_SHM};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sethostname;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::container::{self, Container, Pod, Request};
use crate::dns::{self, Names};
use crate::forward;
use crate::guest::Guest;
use crate::launch::Spares;
use crate::network;
use crate::reaper::Reaper;
use crate::replay::Replayer;
use crate::submounts;
use crate::transport::Transport;

/// What the sandbox cannot do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest does not take a setting.
    #[error("{0}: {1}")]
    Guest(String, io::Error),
    /// There is no such container.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// There is such a container already.
    #[error("container {0:?} already exists")]
    ContainerExists(String),
    /// An id that is not one.
    #[error("container id {0:?} is not valid")]
    BadId(String),
    /// Not what the host says on its side.
    #[error("a stream key of {0} bytes")]
    Key(usize),
    /// The network cannot be made.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// A name server cannot be stood in for.
    #[error(transparent)]
    Names(#[from] dns::Error),
    /// Nobody listens on a port.
    #[error("connect to port {0}: {1}")]
    Port(u32, io::Error),
    /// One container fails.
    #[error(transparent)]
    Container(#[from] container::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// What the host says of the guest at its start. What is empty is left as it is.
#[derive(Debug, Default)]
pub struct Settings {
    /// Host name of the guest.
    pub hostname: String,
    /// Nanoseconds since 1970.
    pub clock_ns: u64,
    /// Random bytes.
    pub entropy: Vec<u8>,
    /// virtio-fs tag of the shared directory.
    pub share_tag: String,
    /// Size of the pod's shared memory.
    pub shm_bytes: u64,
}

/// An entry in the table of containers.
#[derive(Debug)]
enum Entry {
    Creating,
    /// It is being created, and is to be removed then: the host has given up.
    Abandoned,
    Created(Arc<Container>),
}

impl Entry {
    fn created(&self) -> Option<Arc<Container>> {
        match self {
            Self::Created(container) => Some(container.clone()),
            Self::Creating | Self::Abandoned => None,
        }
    }
}

/// The pod that this guest is for.
#[derive(Debug)]
pub struct Sandbox {
    pod: Pod,
    containers: Mutex<HashMap<String, Entry>>,
    ooms: tokio::sync::Mutex<UnboundedReceiver<String>>,
    names: Names,
    replayer: Replayer,
    guest: Guest,
}

impl Sandbox {
    /// A pod without containers.
    pub fn new(transport: Transport, reaper: Reaper, spares: Spares) -> Self {
        let (sender, receiver) = unbounded_channel();
        let pod = Pod { transport, reaper, spares, ooms: sender, share: Arc::default() };
        let ooms = tokio::sync::Mutex::new(receiver);
        Self {
            guest: Guest::new(pod.clone()),
            pod,
            containers: Mutex::default(),
            ooms,
            names: Names::default(),
            replayer: Replayer::default(),
        }
    }

    /// What to say on connections to the host, from now on. A host that has no key is one that tests the agent.
    pub fn set_key(&self, key: &[u8]) -> Result<()> {
        if !key.is_empty() {
            self.pod.transport.set_key(key.try_into().map_err(|_| Error::Key(key.len()))?);
        }
        Ok(())
    }

    /// Makes the network be this one.
    pub async fn set_network(&self, network: &Network) -> Result<()> {
        network::configure(network).await?;
        Ok(self.names.serve(&network.name_servers, &self.pod.transport).await?)
    }

    /// Connects a port of localhost to one of the host.
    pub async fn forward(&self, port: u32, host_port: u32) -> Result<()> {
        let failed = |error| Error::Port(port, error);
        forward::start(port, host_port, &self.pod.transport).await.map_err(failed)
    }

    /// Creates a container.
    pub async fn create(&self, request: Request<'_>) -> Result<Arc<Container>> {
        let id = request.id;
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if id.is_empty() || id.starts_with('.') || !id.bytes().all(good) {
            return Err(Error::BadId(id.to_owned()));
        }
        {
            let mut containers = self.containers();
            if containers.contains_key(id) {
                return Err(Error::ContainerExists(id.to_owned()));
            }
            containers.insert(id.to_owned(), Entry::Creating);
        }
        let created = Container::create(&self.pod, request).await.map(Arc::new);
        let abandoned = {
            let mut containers = self.containers();
            let abandoned = matches!(containers.get(id), Some(Entry::Abandoned));
            match &created {
                Ok(container) if !abandoned => {
                    containers.insert(id.to_owned(), Entry::Created(container.clone()));
                }
                // An abandoned one keeps its id until it is gone.
                Ok(_) => {}
                Err(_) => drop(containers.remove(id)),
            }
            abandoned
        };
        let container = created?;
        if abandoned {
            let removed = container.remove().await;
            self.containers().remove(id);
            removed?;
            return Err(Error::NoContainer(id.to_owned()));
        }
        Ok(container)
    }

    /// The container with this id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = self.containers().get(id).and_then(Entry::created);
        found.ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// What the containers use together: CPU time in microseconds, and bytes of memory.
    pub fn used(&self) -> (u64, u64) {
        let containers: Vec<_> = self.containers().values().filter_map(Entry::created).collect();
        let used = containers.iter().map(|container| container.used());
        used.fold((0, 0), |sum, one| (sum.0.saturating_add(one.0), sum.1.saturating_add(one.1)))
    }

    /// The processes of the guest itself.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Removes a container, whatever it still does. One that is being created is removed when that has ended.
    pub async fn remove(&self, id: &str) -> Result<()> {
        if let Some(entry @ Entry::Creating) = self.containers().get_mut(id) {
            *entry = Entry::Abandoned;
            return Ok(());
        }
        self.container(id)?.remove().await?;
        self.containers().remove(id);
        Ok(())
    }

    /// Makes changes of shared files known to those who watch them.
    pub async fn replay(&self, changes: Vec<Change>) -> Result<()> {
        self.replayer.replay(changes).await.map_err(|e| Error::Guest("replay changes of files".to_owned(), e))
    }

    /// Makes the mounts in volumes be those that the host has.
    pub async fn follow_mounts(&self, come: Vec<SharedMount>, gone: Vec<Vec<u8>>) {
        submounts::follow(&self.pod.share, come, gone).await;
    }

    /// The id of the next container that met an out-of-memory kill.
    pub async fn next_oom(&self) -> Result<String> {
        // The sender lives in this struct: there is always a next one.
        self.ooms.lock().await.recv().await.ok_or_else(|| Error::NoContainer(String::new()))
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sets the guest up for its pod. A guest that was restored from a template has old time and old entropy.
pub fn configure(settings: &Settings) -> Result<()> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| Error::Guest(what, error)
    };
    if settings.clock_ns != 0 {
        set_clock(settings.clock_ns).map_err(failed("set the clock"))?;
    }
    if !settings.entropy.is_empty() {
        add_entropy(&settings.entropy).map_err(failed("add entropy"))?;
    }
    if !settings.hostname.is_empty() {
        sethostname(&settings.hostname).map_err(|e| failed("set the host name")(e.into()))?;
    }
    if !settings.share_tag.is_empty() {
        let what = format!("mount virtio-fs {:?} on {GUEST_SHARE}", settings.share_tag);
        mount_share(&settings.share_tag).map_err(failed(&what))?;
    }
    if settings.shm_bytes != 0 {
        let what = format!("mount a tmpfs of {} bytes on {GUEST_SHM}", settings.shm_bytes);
        mount_shared_memory(settings.shm_bytes).map_err(failed(&what))?;
    }
    Ok(())
}

/// A guest that has just booted has its time from KVM, more exactly than a message can carry it: only a clock that is
/// wrong is set. It is if it is behind the message, which was sent in the past, or far ahead.
fn set_clock(nanoseconds: u64) -> io::Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let sent = Duration::from_nanos(nanoseconds);
    if now >= sent && now - sent < Duration::from_secs(1) {
        return Ok(());
    }
    let seconds = i64::try_from(nanoseconds / SECOND).unwrap_or(i64::MAX);
    let rest = i64::try_from(nanoseconds % SECOND).unwrap_or(0);
    Ok(clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, rest))?)
}

/// random(4): RNDADDENTROPY credits the bytes, RNDRESEEDCRNG puts them to use at once.
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    const MOST: usize = 512;
    /// `struct rand_pool_info` with room.
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; MOST],
    }
    let mut pool = Pool { entropy_bits: 0, size: 0, bytes: [0; MOST] };
    for (to, from) in pool.bytes.iter_mut().zip(bytes) {
        *to = *from;
        pool.size += 1;
    }
    pool.entropy_bits = pool.size * 8;
    let device = File::open("/dev/urandom")?;
    // SAFETY: the pool lives through the call and has `size` bytes.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
    // SAFETY: takes no argument.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}

/// Mounts the pod's shared directory. Shared in the sense of propagation too: a mount that one container makes in a
/// volume with `rshared` shows in the others.
fn mount_share(tag: &str) -> io::Result<()> {
    let none = None::<&str>;
    fs::create_dir_all(GUEST_SHARE)?;
    if is_mount_point(Path::new(GUEST_SHARE))? {
        // The shim called twice.
        return Ok(());
    }
    mount(Some(tag), GUEST_SHARE, Some("virtiofs"), MsFlags::empty(), none)?;
    Ok(mount(none, GUEST_SHARE, none, MsFlags::MS_SHARED, none)?)
}

/// The pod's /dev/shm. In the guest, so that what containers map is memory of the guest and counts against their
/// limits.
fn mount_shared_memory(bytes: u64) -> io::Result<()> {
    fs::create_dir_all(GUEST_SHM)?;
    if is_mount_point(Path::new(GUEST_SHM))? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={bytes}");
    Ok(mount(Some("shm"), GUEST_SHM, Some("tmpfs"), flags, Some(options.as_str()))?)
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let parent = path.parent().unwrap_or(path);
    Ok(fs::metadata(path)?.dev() != fs::metadata(parent)?.dev())
}
