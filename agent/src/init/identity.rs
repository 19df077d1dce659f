//! Who a process is and what it may: scheduling, limits, user, groups, capabilities, no_new_privs, seccomp
//! (runtime-spec, config.md, "Process").

use std::fs;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, fstat, umask};
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};
use oci_spec::runtime::{
    Capabilities, Capability, IOPriorityClass, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, PosixRlimitType, Process, Scheduler,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::control::{Failure, Result};
use crate::seccomp::Filter;

/// Takes what every process of the guest inherits, while this one may still do anything: the OOM score, priorities,
/// the scheduler, CPUs.
pub fn scheduling(process: &Process) -> Result<()> {
    if let Some(score) = process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(Failure::during(format!("set oom_score_adj to {score}")))?;
    }
    if let Some(priority) = process.io_priority() {
        const WHO_PROCESS: libc::c_int = 1;
        let class = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        // linux/ioprio.h: the class in the three bits from 13 on.
        let value = class << 13 | (priority.priority() & 0x1fff);
        // SAFETY: numbers only.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
        Errno::result(result).map_err(Failure::during("set the I/O priority"))?;
    }
    if let Some(scheduler) = process.scheduler() {
        set_scheduler(scheduler)?;
    }
    let affinity = process.exec_cpu_affinity().as_ref();
    if let Some(cpus) = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_ref()) {
        set_affinity(cpus)?;
    }
    Ok(())
}

/// `struct sched_attr`, sched_setattr(2).
#[repr(C)]
#[derive(Default)]
struct SchedulingAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn set_scheduler(scheduler: &Scheduler) -> Result<()> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => return Err(Failure::invalid("scheduler: Linux has no SCHED_ISO")),
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let attributes = SchedulingAttributes {
        size: u32::try_from(size_of::<SchedulingAttributes>()).unwrap_or(0),
        policy: policy.cast_unsigned(),
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0).cast_unsigned(),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    };
    // SAFETY: the attributes live through the call and say their size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    Errno::result(result)
        .map(drop)
        .map_err(Failure::during(format!("set the scheduler {}", scheduler.policy())))
}

/// CPUs as the kernel writes lists of them: `0-3,7`.
fn set_affinity(list: &str) -> Result<()> {
    let wrong = || Failure::invalid(format!("execCPUAffinity {list:?} is not a list of CPUs"));
    // SAFETY: cpu_set_t is plain data; all zeroes is the empty set.
    let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number =
            |text: &str| text.trim().parse().ok().filter(|cpu| *cpu < 8 * size_of::<libc::cpu_set_t>());
        for cpu in number(first).ok_or_else(wrong)?..=number(last).ok_or_else(wrong)? {
            // SAFETY: the number was checked against the size of the set.
            unsafe { libc::CPU_SET(cpu, &mut cpus) };
        }
    }
    // SAFETY: the set lives through the call and has the size given.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const cpus) };
    Errno::result(result).map(drop).map_err(Failure::during(format!("set the CPUs to {list}")))
}

/// Sets the resource limits.
pub fn limits(process: &Process) -> Result<()> {
    for limit in process.rlimits().iter().flatten() {
        let resource = match limit.typ() {
            PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
            PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
            PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
            PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
            PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
            PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
            PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
            PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
            PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
            PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
            PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
            PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
            PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
            PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
            PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
            PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
        };
        let step = || format!("set {} to {}:{}", limit.typ(), limit.soft(), limit.hard());
        setrlimit(resource, limit.soft(), limit.hard()).map_err(|error| Failure::during(step())(error))?;
    }
    Ok(())
}

/// Starts a session keyring of the container's own. Kernels without keys need none.
pub fn keyring(id: &str) {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    if let Ok(name) = std::ffi::CString::new(format!("_ses.{id}")) {
        // SAFETY: the name is a string that lives through the call.
        unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) };
    }
}

/// Gives a standard stream to the process's user, who may want to open it again as /dev/stdout. What cannot change
/// its owner is left as it is.
pub fn own_stream(stream: &OwnedFd, process: &Process) {
    let null = nix::sys::stat::makedev(1, 3);
    if fstat(stream).is_ok_and(|status| status.st_rdev != null) {
        let _ = fchown(stream, Some(Uid::from_raw(process.user().uid())), None);
    }
}

/// Sets no_new_privs if the process asks for it.
pub fn no_new_privileges(process: &Process) -> Result<()> {
    match process.no_new_privileges() {
        Some(true) => prctl::set_no_new_privs().map_err(Failure::during("set no_new_privs")),
        _ => Ok(()),
    }
}

/// Sets the execution domain (personality(2)).
pub fn personality(domain: LinuxPersonalityDomain) -> Result<()> {
    // linux/personality.h
    let persona: libc::c_ulong = match domain {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    };
    // SAFETY: numbers only.
    let result = unsafe { libc::personality(persona) };
    Errno::result(result).map(drop).map_err(Failure::during("set the personality"))
}

/// Loads the seccomp filter.
pub fn seccomp(filter: &Filter) -> Result<()> {
    filter.load().map_err(Failure::during("load the seccomp filter"))
}

/// Becomes the process's user, with its groups, umask and capabilities.
pub fn user_and_capabilities(process: &Process) -> Result<()> {
    let user = process.user();
    umask(Mode::from_bits_truncate(user.umask().unwrap_or(0o022)));
    let sets = Sets::of(process);
    sets.bound()?;
    prctl::set_keepcaps(true).map_err(Failure::during("keep capabilities"))?;

    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).map_err(Failure::during("set the additional groups"))?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).map_err(Failure::during(format!("set the group {gid}")))?;
    setresuid(uid, uid, uid).map_err(Failure::during(format!("set the user {uid}")))?;
    prctl::set_keepcaps(false).map_err(Failure::during("stop keeping capabilities"))?;
    sets.apply()
}

/// The five capability sets as bits (capabilities(7)).
#[derive(Debug, Default, PartialEq, Eq)]
struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Sets {
    fn of(process: &Process) -> Self {
        // A process that says nothing has none.
        let Some(sets) = process.capabilities() else { return Self::default() };
        Self {
            bounding: bits(sets.bounding()),
            effective: bits(sets.effective()),
            inheritable: bits(sets.inheritable()),
            permitted: bits(sets.permitted()),
            ambient: bits(sets.ambient()),
        }
    }

    /// Drops all others from the bounding set, up to the last that the kernel knows.
    fn bound(&self) -> Result<()> {
        for capability in 0..64 {
            // SAFETY: numbers only.
            let known = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
            if known < 0 {
                break;
            }
            if known == 1 && self.bounding & 1 << capability == 0 {
                // SAFETY: numbers only.
                let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
                Errno::result(result).map_err(Failure::during("drop a capability from the bounding set"))?;
            }
        }
        Ok(())
    }

    fn apply(&self) -> Result<()> {
        let set = CapabilitySet::from_bits_retain;
        let sets = CapabilitySets {
            effective: set(self.effective),
            permitted: set(self.permitted),
            inheritable: set(self.inheritable),
        };
        set_capabilities(None, sets).map_err(Failure::during("set the capabilities"))?;
        for capability in (0..64).filter(|capability| self.ambient & 1 << capability != 0) {
            // SAFETY: numbers only.
            let result =
                unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0) };
            // Ambient needs permitted and inheritable. A set that contradicts them is cut down, as by other runtimes.
            if Errno::result(result).is_err() {
                break;
            }
        }
        Ok(())
    }
}

fn bits(capabilities: &Option<Capabilities>) -> u64 {
    capabilities.iter().flatten().fold(0, |bits, capability| bits | 1 << number(*capability))
}

/// linux/capability.h
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_sets_are_bits() {
        let process: Process = serde_json::from_str(
            r#"{"user":{},"cwd":"/","capabilities":{"bounding":["CAP_CHOWN","CAP_CHECKPOINT_RESTORE"],"effective":["CAP_KILL"]}}"#,
        )
        .unwrap();
        let sets = Sets::of(&process);
        assert_eq!(sets, Sets { bounding: 1 | 1 << 40, effective: 1 << 5, ..Sets::default() });
        let without: Process = serde_json::from_str(r#"{"user":{},"cwd":"/"}"#).unwrap();
        assert_eq!(Sets::of(&without), Sets::default());
    }

    #[test]
    fn a_list_of_cpus_is_checked() {
        for bad in ["", "x", "0-", "99999", "-1"] {
            assert!(set_affinity(bad).is_err(), "{bad:?}");
        }
        set_affinity("0").unwrap();
    }
}
