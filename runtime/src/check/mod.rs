//! `kata-runtime check`: can this host run containers in virtual machines? Decided by trying, not by looking
//! for CPU flags and modules.
//!
//! Two answers, as Kata Containers' tool gives them. *Capable* is what the machine can do: its kernel has the system
//! calls, KVM is there, has what the VMM needs, and runs a guest's kernel at the CPU's own speed. *Can currently
//! create* is what the installation can do; only root creates containers, so it is reported to root only.
//!
//! All is looked at, also after something has failed, as far as it does not depend on that. The exit code is 0 if and
//! only if containers can be run here, otherwise 1. A KVM that interprets ring 0 is not enough: a guest's kernel would
//! need many minutes to come up, so it is refused, with a warning that says why.

mod installation;
mod kernel;
mod kvm;
mod report;
mod ring0;

use std::io::{self, Write};
use std::path::Path;

use katana_template::clocksource;
use nix::unistd::Uid;
use report::{Report, Shown, Verdict};

const SPEED: &str = "speed of a guest's kernel";

/// Why this host cannot run containers in virtual machines.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("ERROR: System is not capable of running Kata Containers: {0}")]
    Kernel(#[from] kernel::Error),
    #[error("ERROR: System is not capable of running Kata Containers: {0}")]
    Kvm(#[from] kvm::Error),
    #[error("ERROR: System cannot currently create Kata Containers: {0}")]
    Configuration(#[from] katana_config::Error),
    #[error("ERROR: System cannot currently create Kata Containers: {0}")]
    Installation(#[from] installation::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Checks, and prints what was looked at and the good news to `out`, or all as JSON; with `verbose` each detail to
/// standard error as well.
pub(crate) fn run(
    config: Option<&Path>,
    verbose: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let note = |text: String| {
        if verbose {
            eprintln!("INFO: {text}");
        }
    };
    let machine = machine(&note);
    // Only root can tell whether others than root could change the files.
    let installation = Uid::effective().is_root().then(|| installation(config, &note));
    let shown = Shown::of(&machine, installation.as_ref());
    if json {
        shown.write_json(out)?;
    } else {
        shown.write_list(out)?;
    }
    machine.failure.map_or(Ok(()), Err)?;
    if !json {
        writeln!(out, "System is capable of running Kata Containers")?;
    }
    let Some(installation) = installation else { return Ok(()) };
    installation.failure.map_or(Ok(()), Err)?;
    if !json {
        writeln!(out, "System can currently create Kata Containers")?;
    }
    Ok(())
}

/// What this machine can do.
fn machine(note: &dyn Fn(String)) -> Report<Error> {
    let mut report = Report::default();
    report.add("host's kernel", kernel::check(note));
    match kvm::open(Path::new("/dev/kvm")) {
        Ok(kvm) => {
            report.add("/dev/kvm", Ok::<_, kvm::Error>("opens".to_owned()));
            report.add("KVM", kvm::check_capabilities(&kvm, note));
            report.add(SPEED, speed(&kvm, note));
        }
        Err(e) => {
            report.add("/dev/kvm", Err(e));
            for name in ["KVM", SPEED] {
                report.note(name, Verdict::Skipped, "there is no /dev/kvm".to_owned());
            }
        }
    }
    match clock(clocksource::is_tsc()) {
        (true, text) => report.add("clock", Ok::<_, kvm::Error>(text.to_owned())),
        (false, text) => report.note("clock", Verdict::Warning, text.to_owned()),
    }
    report
}

fn speed(kvm: &kvm_ioctls::Kvm, note: &dyn Fn(String)) -> Result<String, kvm::Error> {
    let slowdown = ring0::slowdown(kvm)?;
    note(format!("ring 0 in a virtual machine takes {slowdown} times as long as ring 3 on this host"));
    if slowdown >= ring0::INTERPRETED {
        return Err(kvm::Error::Interpreted(slowdown));
    }
    Ok(format!("ring 0 takes {slowdown} times as long as on the host"))
}

/// What the installation can do.
fn installation(config: Option<&Path>, note: &dyn Fn(String)) -> Report<Error> {
    let mut report = Report::default();
    match katana_config::load(config) {
        Err(e) => report.add("configuration", Err(e)),
        Ok(config) => {
            note(format!("configuration: {}", config.path.display()));
            report.add("configuration", Ok::<_, katana_config::Error>(config.path.display().to_string()));
            if let Some(line) = config.without_meaning_line() {
                eprintln!("WARNING: {line}");
                report.note("keys of the configuration", Verdict::Warning, line);
            }
            for (name, result) in installation::check(&config) {
                if let Ok(found) = &result {
                    note(format!("{name}: {found}"));
                }
                report.add(name, result);
            }
        }
    }
    report
}

/// What guests take their time from, and whether that is the best there is.
fn clock(tsc: bool) -> (bool, &'static str) {
    let text = if tsc {
        "the TSC, read by guests themselves"
    } else {
        "not the TSC (see /sys/devices/system/clocksource/clocksource0): guests have kvm-clock, which KVM corrects, and \
         ask their kernel for the time"
    };
    (tsc, text)
}

/// Whether the machine can run virtual machines at the CPU's own speed.
pub(crate) fn is_capable() -> bool {
    machine(&|_| {}).failure.is_none()
}
