//! The size of a pod's virtual machine, and the files it is made of.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use katana_config::Config;
use katana_protocol::vmm::Machine;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::spec::Spec;

/// How an ELF file begins: System V ABI, chapter 4.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Magic of an erofs superblock, which starts at byte 1024.
const EROFS_MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// What a pod may use, over all of its containers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Processors, rounded up.
    pub cpus: u64,
    /// Bytes of memory.
    pub memory: u64,
}

impl Limits {
    /// The limits of a pod by its first container: Kubernetes announces the sums on the sandbox container,
    /// any other client means that container alone.
    pub fn of(spec: &Spec) -> Self {
        let annotated = |name: &str| spec.annotations.get(name).and_then(|value| value.parse::<i64>().ok());
        let resources = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let limit = |group: &str, name: &str| number(resources, group, name);
        let prefix = "io.kubernetes.cri.sandbox-";
        let quota = annotated(&format!("{prefix}cpu-quota")).or_else(|| limit("cpu", "quota"));
        let period = annotated(&format!("{prefix}cpu-period")).or_else(|| limit("cpu", "period"));
        let memory = annotated(&format!("{prefix}memory")).or_else(|| limit("memory", "limit"));
        let positive = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).unwrap_or(0);
        let period = Some(positive(period)).filter(|period| *period > 0).unwrap_or(100_000);
        Self { cpus: positive(quota).div_ceil(period), memory: positive(memory) }
    }
}

fn number(resources: Option<&Map<String, Value>>, group: &str, name: &str) -> Option<i64> {
    resources?.get(group)?.get(name)?.as_i64()
}

/// The machine for a pod: at least the configured size, processors for the quota, and the limit's memory on
/// top of what the guest itself needs; and places for its network cards.
pub fn machine(config: &Config, limits: &Limits, host_memory_mib: u64, net_slots: u8) -> Machine {
    let hypervisor = &config.hypervisor;
    let most =
        u64::from(hypervisor.default_maxvcpus.max(hypervisor.default_vcpus)).clamp(1, u64::from(u8::MAX));
    let vcpus = u64::from(hypervisor.default_vcpus).max(limits.cpus).clamp(1, most);
    // "No limit" is at times written as a number close to 2^63.
    let limit = limits.memory.div_ceil(1 << 20);
    let limit = if limit > host_memory_mib { 0 } else { limit };
    let mut kernel_params = hypervisor.kernel_params.clone();
    if config.agent.enable_debug {
        kernel_params.push_str(" agent.log=debug");
    }
    if config.agent.debug_console_enabled {
        kernel_params.push_str(" agent.debug_console");
    }
    Machine {
        vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
        memory_mib: u64::from(hypervisor.default_memory) + limit,
        kernel_params: kernel_params.trim().to_owned(),
        net_slots,
        // The shim attaches no disks, and each slot costs the guest time at boot.
        disk_slots: 0,
        debug: hypervisor.enable_debug,
    }
}

/// Memory of the host in MiB.
pub fn host_memory_mib() -> u64 {
    // SAFETY: sysconf takes an integer.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let bytes = u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(4096));
    bytes >> 20
}

/// What the VMM is given to boot from, in the order in which it expects them, the shared directory excepted.
pub fn open_files(config: &Config) -> Result<[OwnedFd; 3]> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| Error::io("open /dev/kvm", &e))?;
    let kernel = open("kernel", &config.hypervisor.kernel)?;
    expect_magic(&kernel, 0, ELF_MAGIC, "kernel", &config.hypervisor.kernel, "an ELF file (a vmlinux)")?;
    let image = open("guest image", &config.hypervisor.image)?;
    expect_magic(&image, 1024, EROFS_MAGIC, "guest image", &config.hypervisor.image, "an erofs image")?;
    Ok([kvm.into(), kernel.into(), image.into()])
}

/// The VMM does not know the names of the files it is given; the commonest mistakes are found here, by name.
fn expect_magic(
    file: &File,
    offset: u64,
    expected: [u8; 4],
    what: &str,
    path: &Path,
    kind: &str,
) -> Result<()> {
    let mut magic = [0; 4];
    if file.read_exact_at(&mut magic, offset).is_err() || magic != expected {
        return Err(Error::InvalidArgument(format!("{what} \"{}\" is not {kind}", path.display())));
    }
    Ok(())
}

fn open(what: &str, path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io(format_args!("{what} \"{}\"", path.display()), &e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(spec: Value) -> Limits {
        Limits::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn limits_come_from_the_container_or_from_the_pods_annotations() {
        let resources = json!({"cpu": {"quota": 800_000, "period": 100_000}, "memory": {"limit": 64 << 20}});
        let alone = limits(json!({"linux": {"resources": resources}}));
        assert_eq!(alone, Limits { cpus: 8, memory: 64 << 20 });
        let pod = limits(json!({
            "annotations": {"io.kubernetes.cri.sandbox-cpu-quota": "150000", "io.kubernetes.cri.sandbox-cpu-period": "100000",
                            "io.kubernetes.cri.sandbox-memory": "4096"},
            "linux": {"resources": resources}}));
        assert_eq!(pod, Limits { cpus: 2, memory: 4096 });
        let hostile = json!({"cpu": {"quota": -1, "period": 0}, "memory": {"limit": -1}});
        assert_eq!(limits(json!({"linux": {"resources": hostile}})), Limits::default());
        assert_eq!(
            limits(json!({"linux": {"resources": {"cpu": 3, "memory": {"limit": "x"}}}})),
            Limits::default()
        );
    }
}
