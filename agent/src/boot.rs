//! What PID 1 does before it serves: file systems, cgroups, loopback, limits.

use std::convert::Infallible;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use katana_protocol::bridge;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::start_error::StartError;
use crate::warm_up::warm_up;
use crate::{cgroup, console, transparent_huge_pages};

/// A file system of every Linux: source and type, target, flags, options.
struct Mounted(&'static str, &'static str, MsFlags, Option<&'static str>);

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

const MOUNTS: &[Mounted] = &[
    Mounted("proc", "/proc", SAFE, None),
    Mounted("sysfs", "/sys", SAFE, None),
    Mounted("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
    Mounted(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        Some("ptmxmode=0666,mode=0620,gid=5"),
    ),
    Mounted("tmpfs", "/dev/shm", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
    Mounted("mqueue", "/dev/mqueue", SAFE, None),
    Mounted("cgroup2", cgroup::ROOT, SAFE, Some("nsdelegate")),
    // With devices: nodes for containers are made there.
    Mounted("tmpfs", "/run", MsFlags::MS_NOSUID, Some("mode=0755")),
    Mounted("tmpfs", "/tmp", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
];

/// What a kernel need not have.
const OPTIONAL_MOUNTS: &[Mounted] = &[
    Mounted("hugetlbfs", "/dev/hugepages", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), None),
    Mounted("bpf", "/sys/fs/bpf", SAFE, Some("mode=0700")),
];

/// Most open files of the agent, and the hard limit that containers start from. The kernel's fs.nr_open.
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Makes the guest ready for containers.
pub fn boot() -> Result<(), StartError> {
    for file_system in MOUNTS {
        file_system.mount()?;
    }
    for file_system in OPTIONAL_MOUNTS {
        let _ = file_system.mount();
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    console::start(console::level(&command_line))?;
    transparent_huge_pages::set(&command_line);
    cgroup::enable_controllers(Path::new(cgroup::ROOT))
        .map_err(|e| StartError::new("enable the cgroup controllers", &e))?;
    raise_loopback().map_err(|e| StartError::new("raise the loopback interface", &e))?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES)
        .map_err(|e| StartError::new("raise the limit of open files", &e))?;
    nix::unistd::sethostname("localhost").map_err(|e| StartError::new("set the host name", &e))
}

/// Writes why to the console and resets the machine, which ends it (`reboot=k`: through the i8042).
pub fn power_off(error: &StartError) -> ! {
    let line = format!("kata-agent: fatal: {error}\n");
    let console = fs::OpenOptions::new().write(true).open("/dev/console");
    let written = console.and_then(|mut console| console.write_all(line.as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("kata-agent: reset: {error}");
    std::process::exit(1)
}

impl Mounted {
    fn mount(&self) -> Result<(), StartError> {
        let Self(kind, target, flags, options) = *self;
        let made = if Path::new(target).is_dir() { Ok(()) } else { fs::create_dir_all(target) };
        let mounted = made.and_then(|()| match mount(Some(kind), target, Some(kind), flags, options) {
            // A kernel with CONFIG_DEVTMPFS_MOUNT has mounted /dev itself.
            Err(Errno::EBUSY) => Ok(()),
            other => Ok(other?),
        });
        mounted.map_err(|e| StartError::new(format!("mount {kind} on {target}"), &e))
    }
}

/// Raises `lo`, netdevice(7).
fn raise_loopback() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is plain data; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: SIOCGIFFLAGS writes into the ifreq, which lives through the call.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) })?;
    // SAFETY: the kernel has just filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: SIOCSIFFLAGS only reads the ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })?;
    Ok(())
}

/// Reports to the VMM, by a write to its host bridge, that the guest is up and knows no pod yet: other guests may be
/// restored from here. What runs after this may run in any of them, at a later time.
pub fn ready() {
    const HOST_BRIDGE: &str = "/sys/bus/pci/devices/0000:00:00.0/config";
    let reported = fs::OpenOptions::new().read(true).write(true).open(HOST_BRIDGE).and_then(|host_bridge| {
        let mut wanted = [0];
        host_bridge.read_exact_at(&mut wanted, bridge::REGISTER)?;
        if wanted == [bridge::WANTED]
            && let Err(error) = warm_up(&host_bridge)
        {
            log::warn!("warm-up: {error}");
        }
        host_bridge.write_all_at(&[bridge::READY], bridge::REGISTER)
    });
    if let Err(error) = reported {
        log::warn!("{HOST_BRIDGE}: {error}: no template can be made of this guest");
    }
}

/// A function of type `Result<Infallible, _>` never succeeds.
pub type Never = Infallible;
