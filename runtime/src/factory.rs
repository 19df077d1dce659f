//! `kata-runtime factory`: the template from which machines are restored. The first pod's start makes it as well; this
//! is for hosts on which that one is to be as fast as the others.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use katana_config::trusted::{self, Links};
use katana_config::{Config, TemplateScope};
use katana_protocol::mount::{MountAttributes, copy_mount, set_mount};
use katana_protocol::vmm::{self, CONTROL_FD, Event, Machine, Request, Template};
use katana_template::{Draft, Store};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

/// A vsock context id, which the machines from the template do not keep.
const GUEST_CID: u32 = 3;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Configuration(#[from] katana_config::Error),
    #[error("no template: enable_template is false in [factory]")]
    Disabled,
    #[error("no template: enable_debug in [hypervisor.katana] has every machine boot")]
    Debug,
    #[error("template_scope is \"namespace\" in [factory]: whose template is meant, say --namespace")]
    Whose,
    #[error("template: {0}")]
    Store(#[from] katana_template::Error),
    #[error("\"{}\": {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    #[error("kata-vmm: {0}")]
    Control(#[from] vmm::Error),
    #[error("kata-vmm: {0}")]
    Vmm(String),
}

/// Whether there is a template for this configuration.
pub(crate) fn is_there(config: Option<&Path>, namespace: Option<&str>) -> Result<bool, Error> {
    let config = katana_config::load(config)?;
    Ok(config.factory.enable_template && store(&config, namespace)?.open()?.is_some())
}

fn store(config: &Config, namespace: Option<&str>) -> Result<Store, Error> {
    if config.factory.template_scope == TemplateScope::Namespace && namespace.is_none() {
        return Err(Error::Whose);
    }
    Ok(Store::of(config, namespace.unwrap_or_default())?)
}

/// Makes the template, unless it is there.
pub(crate) fn init(config: Option<&Path>, namespace: Option<&str>) -> Result<(), Error> {
    let config = katana_config::load(config)?;
    if !config.factory.enable_template {
        return Err(Error::Disabled);
    }
    if config.hypervisor.enable_debug {
        return Err(Error::Debug);
    }
    let store = store(&config, namespace)?;
    if store.open()?.is_none() {
        let draft = store.begin()?;
        make(&config, &draft)?;
        draft.commit()?;
    }
    Ok(())
}

/// Removes all templates. Machines that come from them keep what they have of them.
pub(crate) fn destroy(config: Option<&Path>) -> Result<(), Error> {
    let config = katana_config::load(config)?;
    for path in Store::all(&config)? {
        std::fs::remove_file(&path).map_err(|source| Error::File { path, source })?;
    }
    Ok(())
}

/// A copy of the mount that a directory is in, attached nowhere yet, as the VMM takes its root.
fn detached(path: &Path) -> io::Result<OwnedFd> {
    let mount = copy_mount(path, false)?;
    // pivot_root(2) takes none that is shared.
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY,
        propagation: libc::MS_PRIVATE,
        ..MountAttributes::default()
    };
    set_mount(&mount, &attributes, false)?;
    Ok(mount)
}

/// Boots a machine that nobody uses, up to the point at which it is a template.
fn make(config: &Config, draft: &Draft) -> Result<(), Error> {
    let hypervisor = &config.hypervisor;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| Error::System("socketpair", e.into()))?;
    let limit = TimeVal::new(i64::from(config.agent.dial_timeout.max(1)), 0);
    setsockopt(&ours, ReceiveTimeout, &limit).map_err(|e| Error::System("SO_RCVTIMEO", e.into()))?;
    let failed = |path: &Path, source| Error::File { path: path.to_owned(), source };
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.map_err(|source| failed(Path::new("/dev/kvm"), source))?;
    let open = |path: &Path| trusted::open(path, Links::Follow).map_err(|source| failed(path, source));
    open(&hypervisor.path)?;
    let (kernel, image) = (open(&hypervisor.kernel)?, open(&hypervisor.image)?);
    // It becomes the VMM's root, of which a guest without a pod has no use.
    let share = detached(&config.factory.template_path).map_err(|e| Error::System("open_tree", e))?;
    let files: [OwnedFd; 4] = [kvm.into(), kernel.into(), image.into(), share];
    let mut vmm = Vmm { outer: spawn(&hypervisor.path, theirs)?, jailed: None };
    let machine =
        Machine { guest_cid: GUEST_CID, template: Template::Make, ..katana_template::machine(config) };
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).chain([draft.file().as_fd()]).collect();
    vmm::send(&ours, &Request::Boot(machine), &fds)?;
    loop {
        let event = match vmm::receive(&ours) {
            Err(vmm::Error::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::Vmm(format!("the guest is not up within {} s", limit.tv_sec())));
            }
            received => received?.0,
        };
        match event {
            Event::Jailed { pid } => vmm.jailed = Some(Pid::from_raw(pid)),
            Event::TemplateMade(None) => return Ok(()),
            Event::TemplateMade(Some(why)) | Event::Failed(why) => return Err(Error::Vmm(why)),
            Event::Exit { reason, .. } => return Err(Error::Vmm(reason.to_string())),
            _ => {}
        }
    }
}

/// Starts the VMM in a network namespace of its own, in which there is nothing.
fn spawn(program: &Path, control: OwnedFd) -> Result<Child, Error> {
    let mut command = Command::new(program);
    command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    let place = move || {
        // SAFETY: the number is free or a descriptor of this process's own, which exec would close anyway.
        let placed = unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&control), CONTROL_FD) };
        Errno::result(placed)?;
        Ok(unshare(CloneFlags::CLONE_NEWNET)?)
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(place) };
    command.spawn().map_err(|source| Error::File { path: program.to_owned(), source })
}

/// Both of the VMM's processes, which end with this. The jailed one is a child as well.
struct Vmm {
    outer: Child,
    jailed: Option<Pid>,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        if let Some(pid) = self.jailed {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
        }
    }
}
