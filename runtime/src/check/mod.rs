//! `kata-runtime check`: can this host run containers in virtual machines? Decided by trying, not by looking
//! for CPU flags and modules.
//!
//! Two answers, as Kata Containers' tool gives them. *Capable* is what the machine can do: its kernel has the system
//! calls, KVM is there, has what the VMM needs, and runs a guest's kernel at the CPU's own speed. *Can currently
//! create* is what the installation can do; only root creates containers, so it is reported to root only.
//!
//! The exit code is 0 if and only if containers can be run here. A KVM that interprets ring 0 is not enough: a
//! guest's kernel would need many minutes to come up, so it is refused, with a warning that says why.

mod installation;
mod kernel;
mod kvm;
mod ring0;

use std::io::{self, Write};
use std::path::Path;

use katana_template::clocksource;
use nix::unistd::Uid;

/// Why this host cannot run containers in virtual machines.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("ERROR: System is not capable of running Kata Containers: {0}")]
    Kernel(#[from] kernel::Error),
    #[error("ERROR: System is not capable of running Kata Containers: {0}")]
    Kvm(#[from] kvm::Error),
    #[error(
        "WARNING: this KVM interprets the guest's kernel: ring 0 runs {0} times slower than the CPU; Linux does \
         not boot in it in useful time\n\
         ERROR: System is not capable of running Kata Containers: KVM interprets ring 0"
    )]
    Interpreted(u64),
    #[error("ERROR: System cannot currently create Kata Containers: {0}")]
    Configuration(#[from] katana_config::Error),
    #[error("ERROR: System cannot currently create Kata Containers: {0}")]
    Installation(#[from] installation::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Checks, and prints the good news to `out`; with `verbose` each check to standard error as well.
pub(crate) fn run(config: Option<&Path>, verbose: bool, out: &mut dyn Write) -> Result<(), Error> {
    let note = |text: String| {
        if verbose {
            eprintln!("INFO: {text}");
        }
    };
    capable(&note)?;
    note(clock(clocksource::is_tsc()).to_owned());
    writeln!(out, "System is capable of running Kata Containers")?;
    if !Uid::effective().is_root() {
        note("not root: whether containers can be created now is not checked".to_owned());
        return Ok(());
    }
    let config = katana_config::load(config)?;
    note(format!("configuration: {}", config.path.display()));
    if let Some(line) = config.without_meaning_line() {
        eprintln!("WARNING: {line}");
    }
    installation::check(&config, &note)?;
    writeln!(out, "System can currently create Kata Containers")?;
    Ok(())
}

/// What guests take their time from.
fn clock(tsc: bool) -> &'static str {
    if tsc {
        "clock: the TSC, read by guests themselves"
    } else {
        "clock: not the TSC (see /sys/devices/system/clocksource/clocksource0): guests have kvm-clock, which KVM corrects, \
         and ask their kernel for the time"
    }
}

/// Whether the machine can run virtual machines at the CPU's own speed.
pub(crate) fn capable(note: &dyn Fn(String)) -> Result<(), Error> {
    kernel::check(note)?;
    let kvm = kvm::open(Path::new("/dev/kvm"))?;
    kvm::check_capabilities(&kvm, note)?;
    let slowdown = ring0::slowdown(&kvm)?;
    note(format!("ring 0 in a virtual machine takes {slowdown} times as long as ring 3 on this host"));
    if slowdown >= ring0::INTERPRETED { Err(Error::Interpreted(slowdown)) } else { Ok(()) }
}
