//! The machine's vCPUs: made when they are needed. One that only might be is memory of the host's kernel and a thread,
//! of every pod, for each processor that the host has.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::bus::Bus;
use crate::cpu::{self, Topology};
use crate::end::End;
use crate::kvm;
use crate::seccomp::{self, Kind};
use crate::vcpu::Vcpu;

/// Why there are not as many vCPUs as were asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More than the machine can have.
    #[error("{wanted} vCPUs: the machine has {most} at most")]
    TooMany {
        /// Asked for.
        wanted: u8,
        /// That it can have.
        most: u8,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Its state.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    /// The host.
    #[error("thread for a vCPU: {0}")]
    Thread(io::Error),
}

/// What makes vCPUs.
pub struct Maker {
    /// The kernel's machine.
    pub vm: Arc<VmFd>,
    /// What its KVM can offer.
    pub cpuid: CpuId,
    /// How the vCPUs belong together.
    pub topology: Topology,
}

impl Maker {
    /// Makes the vCPU with this number, and sets its CPUID.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn make(&self, number: u8) -> Result<VcpuFd, Error> {
        let fd = kvm::create_vcpu(&self.vm, number)?;
        cpu::identify(&fd, number, &self.cpuid, &self.topology)?;
        Ok(fd)
    }
}

/// What is asked of the thread of [`Starter::start`].
pub enum Wanted {
    /// That there be a number of vCPUs; the callback takes the result.
    Vcpus(u8, Box<dyn FnOnce(Result<(), Error>) + Send>),
    /// To start a thread of a device, which confines itself further.
    Thread(Box<dyn FnOnce() + Send>),
}

/// Makes and starts vCPUs while the guest runs, and other threads, on a thread of its own: no other one may do what that
/// needs.
pub struct Starter {
    /// Makes them.
    pub maker: Maker,
    /// The machine's ports.
    pub ports: Arc<Bus>,
    /// The machine's addresses that are not memory.
    pub addresses: Arc<Bus>,
    /// Where the end of the VM is reported.
    pub end: Arc<End>,
    /// How many there are.
    pub started: u8,
    /// Whether devices may want threads.
    pub devices: bool,
}

impl Starter {
    /// A vCPU of this machine.
    pub fn vcpu(&self, number: u8, fd: VcpuFd) -> Vcpu {
        let (ports, addresses, end) = (self.ports.clone(), self.addresses.clone(), self.end.clone());
        Vcpu { fd, number, ports, addresses, end, maker: None }
    }

    /// Starts the thread, unless there are all vCPUs that there can be, and no devices that want any. It ends with the
    /// VM.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(mut self, wanted: Receiver<Wanted>) -> io::Result<()> {
        if self.started == self.maker.topology.vcpus && !self.devices {
            return Ok(());
        }
        let body = move || match seccomp::install(Kind::Starter) {
            Ok(()) => wanted.into_iter().for_each(|wanted| match wanted {
                Wanted::Vcpus(count, answer) => answer(self.grow_to(count)),
                Wanted::Thread(start) => start(),
            }),
            // Nobody takes requests then, which those who make them find out.
            Err(error) => log::error!("no more vCPUs and threads can be made: {error}"),
        };
        thread::Builder::new().name("starter".to_owned()).stack_size(256 * 1024).spawn(body).map(drop)
    }

    fn grow_to(&mut self, count: u8) -> Result<(), Error> {
        let most = self.maker.topology.vcpus;
        if count > most {
            return Err(Error::TooMany { wanted: count, most });
        }
        while self.started < count {
            let number = self.started;
            let fd = self.maker.make(number)?;
            cpu::set_up(&fd, number, None)?;
            self.vcpu(number, fd).start().map_err(Error::Thread)?;
            self.started += 1;
        }
        Ok(())
    }
}
