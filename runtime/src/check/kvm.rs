//! /dev/kvm: that it opens and has what the VMM asks of it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};
use nix::errno::Errno;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot open {}: {source}{}", path.display(), advice(.source))]
    Open { path: PathBuf, source: io::Error },
    #[error("{} has KVM's API in version {version}, not {KVM_API_VERSION}", path.display())]
    ApiVersion { path: PathBuf, version: i32 },
    #[error("KVM lacks {name}, needed for {purpose}")]
    Capability { name: &'static str, purpose: &'static str },
    #[error("KVM cannot create a virtual machine: {0}: another hypervisor uses the CPU's virtualization")]
    Busy(io::Error),
    #[error("KVM cannot {step}: {source}")]
    Step { step: &'static str, source: io::Error },
    #[error(
        "this KVM interprets the guest's kernel: ring 0 runs {0} times slower than the CPU; Linux does not boot in it in \
         useful time"
    )]
    Interpreted(u64),
    #[error("the test guest stopped with {0} instead of a halt")]
    Exit(String),
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            ": load the module kvm_intel or kvm_amd, or enable virtualization in the firmware"
        }
        io::ErrorKind::PermissionDenied => ": run this as root or as a member of the group that owns it",
        _ if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENODEV | Errno::ENXIO)) => {
            ": load the module kvm_intel or kvm_amd, or enable virtualization in the firmware"
        }
        _ => "",
    }
}

/// Names a step of setting up a VM in its error.
pub(crate) fn step<T>(step: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, Error> {
    result.map_err(|error| Error::Step { step, source: error.into() })
}

/// What the VMM asks of KVM: `REQUIRED` in vmm/src/kvm.rs.
const NEEDED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM", "the guest image"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "interrupts"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER", "timers"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING", "interrupts of devices"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "interrupts of devices"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "doorbells of devices"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "virtual CPUs"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "virtual CPUs on Intel"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "virtual CPUs on Intel"),
];

/// Opens KVM.
pub(crate) fn open(path: &Path) -> Result<Kvm, Error> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_CLOEXEC).open(path);
    let file = opened.map_err(|source| Error::Open { path: path.to_owned(), source })?;
    // SAFETY: the descriptor is open and from here on owned by nobody else. That it may not be KVM's is found
    // out by the next call, which then fails.
    let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        version if u32::try_from(version) == Ok(KVM_API_VERSION) => Ok(kvm),
        version => Err(Error::ApiVersion { path: path.to_owned(), version }),
    }
}

/// Checks for what the VMM needs.
pub(crate) fn check_capabilities(kvm: &Kvm, note: &dyn Fn(String)) -> Result<String, Error> {
    for (capability, name, purpose) in NEEDED {
        if !kvm.check_extension(*capability) {
            return Err(Error::Capability { name, purpose });
        }
        note(format!("{name}: available"));
    }
    Ok("has all that the VMM needs".to_owned())
}
