//! One vCPU: a thread that runs the guest and answers what KVM does not answer itself.

use std::io;
use std::sync::Arc;
use std::thread;

use katana_protocol::counters::Counter;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::counters;
use crate::end::{End, Ended};
use crate::seccomp::{self, Kind};
use crate::template::{Asked, Maker};

/// A vCPU that does not run yet.
pub struct Vcpu {
    /// KVM's side of it.
    pub fd: VcpuFd,
    /// Its number, and its APIC id.
    pub number: u8,
    /// The machine's ports.
    pub ports: Arc<Bus>,
    /// The machine's addresses that are not memory.
    pub addresses: Arc<Bus>,
    /// Where the end of the VM is reported.
    pub end: Arc<End>,
    /// What makes a template when it is time.
    pub maker: Option<Maker>,
}

impl Vcpu {
    /// Starts the thread. It ends with the VM.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(mut self) -> io::Result<()> {
        let body = move || {
            let kind = if self.maker.is_some() { Kind::TemplateVcpu } else { Kind::Vcpu };
            let ended = match seccomp::install(kind) {
                Ok(()) => self.run(),
                Err(error) => Some(Ended::Internal(format!("vCPU {}: {error}", self.number))),
            };
            if let Some(ended) = ended {
                self.end.reach(ended);
            }
        };
        // A vCPU's thread calls nothing deep; the stack is memory of every pod.
        thread::Builder::new().name("vcpu".to_owned()).stack_size(256 * 1024).spawn(body)?;
        Ok(())
    }

    /// Runs until the VM ends; returns the reason unless it has been reported already.
    pub(crate) fn run(&mut self) -> Option<Ended> {
        loop {
            let exit = self.fd.run();
            if let Some(kind) = kind(&exit) {
                counters::exit(self.number, kind);
            }
            match exit {
                Ok(VcpuExit::IoIn(port, data)) => self.ports.read(u64::from(port), data),
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.ports.write(u64::from(port), data);
                    if let Some(asked) = self.maker.as_ref().and_then(Maker::asked)
                        && let Err(error) = self.answer(asked)
                    {
                        return Some(Ended::Internal(format!("vCPU {}: {error}", self.number)));
                    }
                    if self.end.reached().is_some() {
                        return None;
                    }
                }
                Ok(VcpuExit::MmioRead(address, data)) => self.addresses.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.addresses.write(address, data),
                Ok(VcpuExit::Shutdown) => return Some(Ended::TripleFault),
                Ok(VcpuExit::Hlt | VcpuExit::Intr) => {}
                Ok(VcpuExit::InternalError) => return Some(Ended::Internal(self.internal_error())),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let text =
                        format!("vCPU {} cannot run: hardware reason {reason:#x} on CPU {cpu}", self.number);
                    return Some(Ended::Internal(text));
                }
                Ok(other) => {
                    let text = format!("vCPU {}: unexpected exit {other:?}", self.number);
                    return Some(Ended::Internal(text));
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => {
                    let at = self.instruction();
                    return Some(Ended::Internal(format!("KVM_RUN of vCPU {}: {error}{at}", self.number)));
                }
            }
        }
    }

    /// Does what a guest that becomes a template asks for.
    fn answer(&mut self, asked: Asked) -> Result<(), seccomp::Error> {
        match (asked, self.maker.take()) {
            (Asked::Template, Some(maker)) => self.make_template(maker),
            (Asked::Nothing, Some(maker)) => {
                maker.give_up();
                seccomp::install(Kind::Vcpu)
            }
            (Asked::Later, Some(maker)) => {
                if let Err(error) = maker.advance_clock(&self.fd) {
                    log::warn!("the guest's clocks cannot go on at once: {error}");
                }
                self.maker = Some(maker);
                Ok(())
            }
            (_, None) => Ok(()),
        }
    }

    fn make_template(&mut self, maker: Maker) -> Result<(), seccomp::Error> {
        // The instruction that led here has taken effect only when KVM is entered again (KVM API, 5, KVM_EXIT_IO).
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
        maker.make(&self.fd);
        // From now on like all others.
        seccomp::install(Kind::Vcpu)
    }

    fn instruction(&self) -> String {
        self.fd.get_regs().map_or_else(|_| String::new(), |regs| format!(", at rip {:#x}", regs.rip))
    }

    /// What KVM says about its own failure (KVM API, KVM_EXIT_INTERNAL_ERROR).
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason says that this member of the union is the one in use.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let what = match error.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "an instruction could not be emulated".to_owned(),
            KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions came at once".to_owned(),
            KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered".to_owned(),
            other => format!("internal error {other}"),
        };
        format!("KVM on vCPU {}: {what}{}", self.number, self.instruction())
    }
}

/// As what an exit is counted. The others are the machine's end.
fn kind(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<Counter> {
    Some(match exit {
        Ok(VcpuExit::IoIn(..)) => Counter::ExitPortRead,
        Ok(VcpuExit::IoOut(..)) => Counter::ExitPortWrite,
        Ok(VcpuExit::MmioRead(..)) => Counter::ExitMmioRead,
        Ok(VcpuExit::MmioWrite(..)) => Counter::ExitMmioWrite,
        Ok(VcpuExit::Hlt) => Counter::ExitHalt,
        Ok(VcpuExit::Intr) | Err(_) => Counter::ExitInterrupted,
        Ok(_) => return None,
    })
}

#[cfg(test)]
mod tests;
