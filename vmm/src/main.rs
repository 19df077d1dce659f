//! kata-vmm: one virtual machine, one process. Started by containerd-shim-kata-v2, which hands over all that it
//! works with; see `katana_protocol::vmm`.

mod board;
mod boot;
mod bus;
mod console_ring;
mod control;
mod counters;
mod cpu;
mod end;
mod error;
mod i8042;
mod irq;
mod jail;
mod kvm;
mod logger;
mod machine;
mod memory;
mod mptable;
mod pci;
mod placeholder;
mod seccomp;
mod serial;
mod sync;
mod template;
mod vcpu;
mod vcpus;
mod virtio;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use katana_protocol::kernel;
use katana_protocol::vmm::{Event, Machine as Shape, Request, Template};

use board::Files;
use control::{Control, ControlService};
use jail::Side;
use machine::Machine;

/// Why the VM does not start.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// Not a request to boot, with its four descriptors.
    #[error("the first message is not a request to boot with /dev/kvm, kernel, image and shared directory")]
    FirstMessage,
    #[error("close what is not this program's: {0}")]
    Strangers(io::Error),
    #[error(transparent)]
    Control(#[from] katana_protocol::vmm::Error),
    #[error(transparent)]
    Jail(#[from] jail::Error),
    #[error(transparent)]
    Machine(#[from] error::Error),
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        println!("kata-vmm {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    // One heap for all threads: each of its own would be pages and page tables of every pod.
    // SAFETY: mallopt takes two integers, and no other thread exists yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let control = match Control::inherited() {
        Ok(control) => control,
        Err(error) => {
            eprintln!(
                "kata-vmm: control socket: {error}: this program is started by containerd-shim-kata-v2"
            );
            return ExitCode::FAILURE;
        }
    };
    match run(&control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = error.to_string();
            log::error!("{error}");
            // If the shim is gone, nobody needs to know.
            let _ = control.report(&Event::Failed(error));
            ExitCode::FAILURE
        }
    }
}

/// The life of a VMM, outside and inside of its jail.
fn run(control: &Control) -> Result<(), Error> {
    close_strangers()?;
    let (shape, files, share, cgroup) = receive_machine(control)?;
    logger::start(shape.debug);
    let announce = |pid| control.report(&Event::Jailed { pid }).map_err(io::Error::other);
    let Side::Inside(jail) = jail::enter(&share, cgroup.as_ref(), announce)? else { return Ok(()) };
    drop((share, cgroup));

    let streams = control.clone();
    let incoming = Box::new(move |port, stream: OwnedFd| {
        streams.hand_over(port, stream.as_fd()).map_err(io::Error::other)
    });
    let events = control.clone();
    let plugged = Box::new(move |bytes: u64| {
        if let Err(error) = events.report(&Event::MemoryPlugged { mib: bytes >> 20 }) {
            log::warn!("control socket: {error}");
        }
    });
    let events = control.clone();
    let made = Box::new(move |made: Result<(), template::Error>| {
        let failed = made.err().map(|error| error.to_string());
        if let Err(error) = events.report(&Event::TemplateMade(failed)) {
            log::warn!("control socket: {error}");
        }
    });
    let (mut machine, slots) = Machine::build(&shape, files, jail, incoming, plugged, made)?;
    machine.subscribe(ControlService::new(control.clone(), slots, machine.console(), machine.end()));
    machine.start()?;
    control.report_running(machine.vm())?;
    let (reason, console) = machine.run();
    Ok(control.report(&Event::Exit { reason, console })?)
}

/// Descriptors that the shim leaked would be there in the jail as well.
fn close_strangers() -> Result<(), Error> {
    let first = (katana_protocol::vmm::CONTROL_FD + 1) as libc::c_uint;
    // SAFETY: nothing in this process has opened a descriptor yet.
    if unsafe { libc::close_range(first, libc::c_uint::MAX, 0) } != 0 {
        return Err(Error::Strangers(kernel::CLOSE_RANGE.explain(io::Error::last_os_error())));
    }
    Ok(())
}

/// What the first message brings: machine, files, the shared directory, and the cgroup.
fn receive_machine(control: &Control) -> Result<(Shape, Files, OwnedFd, Option<OwnedFd>), Error> {
    let (request, fds) = control.next()?;
    let Request::Boot(shape) = request else { return Err(Error::FirstMessage) };
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or(Error::FirstMessage);
    let (kvm, kernel, image, share) = (next()?, next()?.into(), next()?.into(), next()?);
    let template = (shape.template != Template::None).then(&mut next).transpose()?.map(Into::into);
    Ok((shape, Files { kvm, kernel, image, template }, share, next().ok()))
}
