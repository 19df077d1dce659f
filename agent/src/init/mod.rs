//! A process of a container up to its execve: this program again, single-threaded, as `kata-agent container-init`.
//!
//! The rooms, in the order in which things happen: [`control`] (what the agent asks), [`namespaces`], [`rootfs`] with
//! [`mounts`], [`devices`] and [`terminal`], [`identity`], [`program`].

mod confined;
pub mod control;
mod devices;
mod identity;
pub mod mount_options;
mod mounts;
mod namespaces;
mod program;
mod rootfs;
mod terminal;

pub use confined::{Make, Root};
pub use devices::forget as forget_devices;
pub use mount_options::parse as parse_mount_options;
pub use namespaces::CLONE_NEWTIME;
pub use rootfs::prepare;
pub use terminal::resize;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use nix::sys::prctl;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use oci_spec::runtime::{Process, Spec};

use crate::hooks::{self, Stage};
use crate::seccomp::Filter;
use control::{Control, Descriptors, Failure, Order, Report, Result, Task, Work};
use namespaces::Sysctls;

/// Runs until the execve. Returns only to report a failure.
pub fn main() -> ExitCode {
    let control = Control::inherited();
    let Err(failure) = control.task().and_then(|(task, descriptors)| run(&control, &task, descriptors));
    control.report(&Report::Failed(failure), &[]);
    ExitCode::FAILURE
}

fn run(control: &Control, task: &Task, descriptors: Descriptors) -> Result<control::Never> {
    // Neither ptrace nor /proc/<pid>/fd of this process for those whose pid namespace it is about to enter.
    prctl::set_dumpable(false).map_err(Failure::during("forbid tracing"))?;
    prctl::set_name(c"container-init").map_err(Failure::during("set the process's name"))?;
    join_cgroup(&task.cgroups)?;
    identity::scheduling(&task.process)?;
    task.personality.map_or(Ok(()), identity::personality)?;
    match &task.work {
        Work::Container { spec, pause: true, .. } => pause(control, spec, &task.process, descriptors),
        Work::Container { id, spec, .. } => {
            let cgroup = task.cgroups.first().ok_or_else(|| Failure::internal("no cgroup"))?;
            let (process, seccomp) = (&task.process, task.seccomp.as_ref());
            Container { control, id, spec, process, seccomp, cgroup }.run(descriptors)
        }
        Work::Exec { namespaces, copies: false } => exec(control, task, *namespaces, descriptors),
        Work::Exec { namespaces, copies: true } => copy(control, &task.process, *namespaces, descriptors),
        Work::Guest => in_guest(control, &task.process, descriptors),
    }
}

/// One more process of a container.
fn exec(control: &Control, task: &Task, namespaces: i32, descriptors: Descriptors) -> Result<control::Never> {
    let process = &task.process;
    // Before joining: raising a limit takes a privilege that no process in a user namespace has.
    identity::limits(process)?;
    namespaces::join(control, &descriptors.container()?, namespaces)?;
    start_session()?;
    let terminal = match &descriptors.stdio {
        Some(_) => None,
        None => Some(terminal::open_for(control, process, None)?),
    };
    attach_stdio(descriptors.stdio, terminal, process)?;
    let program = become_user(process, task.seccomp.as_ref())?;
    program.execute(task.seccomp.as_ref().filter(|_| late_seccomp(process)))
}

/// A process that copies files of a container, with the privileges that the host gives it for that.
fn copy(
    control: &Control,
    process: &Process,
    namespaces: i32,
    descriptors: Descriptors,
) -> Result<control::Never> {
    let program = program::Itself::open()?;
    // From here on paths lead through the container's root, and links nowhere else.
    namespaces::join(control, &descriptors.container()?, namespaces)?;
    start_session()?;
    attach_stdio(descriptors.stdio, None, process)?;
    program::close_descriptors_on_exec()?;
    identity::no_new_privileges(process)?;
    identity::user_and_capabilities(process)?;
    program.execute("copy", process.args().as_deref().unwrap_or_default())
}

/// A process of the guest itself. It may do what the agent may.
fn in_guest(control: &Control, process: &Process, descriptors: Descriptors) -> Result<control::Never> {
    start_session()?;
    let terminal = match &descriptors.stdio {
        Some(_) => None,
        None => Some(terminal::open_for(control, process, None)?),
    };
    attach_stdio(descriptors.stdio, terminal, process)?;
    program::close_descriptors_on_exec()?;
    program::change_directory(process.cwd())?;
    program::Program::find(process, Path::new("/etc/passwd"))?.execute(None)
}

/// The first process of a pod's sandbox container. It has the namespaces that the pod's containers join, an empty root,
/// and no privileges.
fn pause(
    control: &Control,
    spec: &Spec,
    process: &Process,
    descriptors: Descriptors,
) -> Result<control::Never> {
    let program = program::Itself::open()?;
    let namespaces = namespaces::Wanted::of(spec)?;
    namespaces::sysctls(spec, Sysctls::Network)?;
    namespaces.enter(control, spec)?;
    start_session()?;
    namespaces::names(spec, &namespaces)?;
    namespaces::sysctls(spec, Sysctls::Other)?;
    rootfs::Rootfs::empty()?.enter(spec)?;
    identity::limits(process)?;
    attach_stdio(descriptors.stdio, None, process)?;
    program::close_descriptors_on_exec()?;
    identity::no_new_privileges(process)?;
    identity::user_and_capabilities(process)?;
    control.report(&Report::Ready { small: false }, &[]);
    control.expect(Order::Run)?;
    program.execute("pause", &[])
}

/// The first process of a container.
struct Container<'a> {
    control: &'a Control,
    id: &'a str,
    spec: &'a Spec,
    process: &'a Process,
    seccomp: Option<&'a Filter>,
    cgroup: &'a Path,
}

impl Container<'_> {
    /// What the OCI runtime specification calls "create" (runtime.md, "Lifecycle"), the wait for "start", and that.
    fn run(&self, descriptors: Descriptors) -> Result<control::Never> {
        let (spec, process) = (self.spec, self.process);
        let namespaces = namespaces::Wanted::of(spec)?;
        devices::prepare(self.id, spec, namespaces.user())?;
        if namespaces.user() {
            // Raising a limit takes a privilege that no process in a user namespace has.
            identity::limits(process)?;
        }
        namespaces::sysctls(spec, Sysctls::Network)?;
        namespaces.enter(self.control, spec)?;
        start_session()?;
        namespaces::names(spec, &namespaces)?;
        namespaces::sysctls(spec, Sysctls::Other)?;
        identity::keyring(self.id);

        let rootfs = rootfs::Rootfs::attach(spec)?;
        mounts::Mounter { rootfs: &rootfs, namespaces: &namespaces, cgroup: self.cgroup }.mount_all(spec)?;
        devices::create(self.id, &rootfs, spec)?;
        let terminal = match &descriptors.stdio {
            Some(_) => None,
            None => Some(terminal::open_for(self.control, process, Some(&rootfs))?),
        };
        // As the guest's pid namespace counts: its own /proc is still in sight.
        let pid = fs::read_link("/proc/self").ok().and_then(|pid| pid.to_str()?.parse().ok());
        hooks::run(Stage::CreateContainer, self.id, spec, pid).map_err(Failure::internal)?;
        rootfs.hide_paths(spec)?;
        rootfs.enter(spec)?;

        program::make_working_directory(process);
        if !namespaces.user() {
            identity::limits(process)?;
        }
        attach_stdio(descriptors.stdio, terminal, process)?;
        let program = become_user(process, self.seccomp)?;
        self.control.report(&Report::Ready { small: program.is_small() }, &[]);
        self.control.expect(Order::Run)?;
        hooks::run(Stage::StartContainer, self.id, spec, pid).map_err(Failure::internal)?;
        program.execute(self.seccomp.filter(|_| late_seccomp(process)))
    }
}

/// Enters the first of the cgroups that takes the process. An exec has the one of the container's first process as
/// its second choice: a container that manages cgroups of its own may have made the first an inner node.
fn join_cgroup(cgroups: &[std::path::PathBuf]) -> Result<()> {
    let mut result = Ok(());
    for cgroup in cgroups {
        result = fs::write(cgroup.join("cgroup.procs"), "0")
            .map_err(Failure::during(format!("join cgroup {}", cgroup.display())));
        if result.is_ok() {
            break;
        }
    }
    result
}

fn start_session() -> Result<()> {
    setsid().map(drop).map_err(Failure::during("start a session"))
}

fn attach_stdio(pipes: Option<[OwnedFd; 3]>, terminal: Option<OwnedFd>, process: &Process) -> Result<()> {
    let [stdin, stdout, stderr] = match (pipes, terminal) {
        (Some(pipes), _) => pipes,
        (None, Some(terminal)) => {
            let duplicate = || terminal.try_clone().map_err(Failure::during("duplicate the terminal"));
            [duplicate()?, duplicate()?, terminal]
        }
        (None, None) => return Err(Failure::internal("no standard streams")),
    };
    for stream in [&stdin, &stdout, &stderr] {
        identity::own_stream(stream, process);
    }
    dup2_stdin(stdin).map_err(Failure::during("set standard input"))?;
    dup2_stdout(stdout).map_err(Failure::during("set standard output"))?;
    dup2_stderr(stderr).map_err(Failure::during("set standard error"))
}

/// Drops privileges as far as the process asks, and looks its program up with what is left.
fn become_user(process: &Process, seccomp: Option<&Filter>) -> Result<program::Program> {
    program::close_descriptors_on_exec()?;
    if !process.cwd().is_absolute() {
        return Err(Failure::invalid("cwd must be an absolute path"));
    }
    let changed = program::change_directory(process.cwd())?;
    identity::no_new_privileges(process)?;
    if let Some(filter) = seccomp.filter(|_| !late_seccomp(process)) {
        identity::seccomp(filter)?;
    }
    identity::user_and_capabilities(process)?;
    if !changed {
        program::change_directory_as_user(process.cwd())?;
    }
    program::check_working_directory(process.cwd())?;
    program::Program::find(process, Path::new("/etc/passwd"))
}

/// Without no_new_privs a filter can only be loaded with CAP_SYS_ADMIN (seccomp(2)), so before the capabilities go.
/// With it, it is loaded last, so that a narrow profile need not allow what the steps before need.
fn late_seccomp(process: &Process) -> bool {
    process.no_new_privileges() == Some(true)
}
