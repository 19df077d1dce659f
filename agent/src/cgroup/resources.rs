//! OCI resources as values of cgroup v2 files.
//!
//! The OCI runtime specification speaks cgroup v1; the conversions are those that every runtime agrees on
//! (runtime-spec, config-linux.md; Linux, cgroup-v2.rst). What names CPUs, disks and NICs of the host the shim leaves
//! out, so it has no conversion here (`shim/src/spec.rs` `resources_for_guest`).

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

/// One value for one file.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// The file's name in the cgroup.
    pub file: String,
    /// What to write.
    pub value: String,
    /// A failure is only worth a warning.
    pub best_effort: bool,
}

fn must(file: &str, value: impl std::fmt::Display) -> Setting {
    Setting { file: file.to_owned(), value: format!("{value}"), best_effort: false }
}

fn try_to(file: &str, value: impl std::fmt::Display) -> Setting {
    Setting { best_effort: true, ..must(file, value) }
}

/// What to write for `resources`, in order. `memory_current` is what the cgroup uses now.
pub fn settings(resources: &LinuxResources, memory_current: Option<i64>) -> Result<Vec<Setting>, String> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        memory_settings(memory, memory_current, &mut settings)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut settings);
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            0 => (),
            limit => settings.push(must("pids.max", max_below_zero(limit))),
        }
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        // The name becomes part of a file name: a number and a unit, nothing else.
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(format!("page size {size:?} is not valid"));
        }
        let file = format!("hugetlb.{size}.max");
        // Kubernetes names all sizes that the host has: the guest may lack one that nobody wants.
        settings.push(if limit.limit() == 0 {
            try_to(&file, 0)
        } else {
            must(&file, max_below_zero(limit.limit()))
        });
    }
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') || !file.contains('.') {
            return Err(format!("unified key {file:?} is not a file of a cgroup"));
        }
        settings.push(must(file, value));
    }
    Ok(settings)
}

fn max_below_zero(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory_settings(
    memory: &LinuxMemory,
    current: Option<i64>,
    settings: &mut Vec<Setting>,
) -> Result<(), String> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = swap_alone(limit, memory.swap())? {
        // A kernel without swap has no such file, and then there is nothing to limit.
        settings.push(try_to("memory.swap.max", swap));
    }
    if let Some(limit) = limit {
        if memory.check_before_update() == Some(true) && limit > 0 && current.is_some_and(|used| used > limit)
        {
            return Err(format!(
                "the memory limit {limit} is below what is in use: {}",
                current.unwrap_or(0)
            ));
        }
        settings.push(must("memory.max", max_below_zero(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        settings.push(must("memory.low", max_below_zero(reservation)));
    }
    Ok(())
}

/// v1 limits memory and swap together, v2 swap alone.
fn swap_alone(limit: Option<i64>, swap: Option<i64>) -> Result<Option<String>, String> {
    match (limit, swap) {
        (_, None | Some(0)) => Ok(None),
        (_, Some(..=-1)) => Ok(Some("max".to_owned())),
        (Some(..=-1), Some(_)) => Ok(Some("max".to_owned())),
        (None, Some(_)) => Err("a swap limit needs a memory limit".to_owned()),
        (Some(limit), Some(swap)) if swap < limit => {
            Err(format!("the limit of memory and swap, {swap}, is below the memory limit, {limit}"))
        }
        (Some(limit), Some(swap)) => Ok(Some((swap - limit).to_string())),
    }
}

fn cpu_settings(cpu: &LinuxCpu, settings: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle() {
        settings.push(must("cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        settings.push(must("cpu.weight", weight_of_shares(shares)));
    }
    // The kernel refuses a burst above the quota: with a smaller quota the burst must shrink first.
    let burst = cpu.burst().map(|burst| must("cpu.max.burst", burst));
    let (quota, period) =
        (cpu.quota().filter(|quota| *quota != 0), cpu.period().filter(|period| *period != 0));
    let max = match (quota, period) {
        (None, None) => None,
        (quota, period) => {
            let quota = quota.filter(|quota| *quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
            Some(must("cpu.max", format!("{quota} {}", period.unwrap_or(100_000))))
        }
    };
    settings.extend(max);
    settings.extend(burst);
}

/// Shares 2..=262144 onto weights 1..=10000.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let settings = settings(&resources, Some(1000))?;
        Ok(settings.into_iter().map(|setting| (setting.file, setting.value)).collect())
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn each_resource_becomes_its_files() {
        let table: &[(&str, &[(&str, &str)])] = &[
            (r#"{"memory":{"limit":67108864}}"#, &[("memory.max", "67108864")]),
            (r#"{"memory":{"limit":-1,"swap":-1}}"#, &[("memory.swap.max", "max"), ("memory.max", "max")]),
            (r#"{"memory":{"limit":100,"swap":150}}"#, &[("memory.swap.max", "50"), ("memory.max", "100")]),
            (r#"{"memory":{"limit":100,"swap":100}}"#, &[("memory.swap.max", "0"), ("memory.max", "100")]),
            (r#"{"memory":{"reservation":7}}"#, &[("memory.low", "7")]),
            (r#"{"cpu":{"shares":1024}}"#, &[("cpu.weight", "39")]),
            (r#"{"cpu":{"shares":2}}"#, &[("cpu.weight", "1")]),
            (r#"{"cpu":{"shares":262144}}"#, &[("cpu.weight", "10000")]),
            (r#"{"cpu":{"shares":18446744073709551615}}"#, &[("cpu.weight", "10000")]),
            (r#"{"cpu":{"quota":50000,"period":100000}}"#, &[("cpu.max", "50000 100000")]),
            (r#"{"cpu":{"quota":-1}}"#, &[("cpu.max", "max 100000")]),
            (r#"{"cpu":{"period":50000}}"#, &[("cpu.max", "max 50000")]),
            (r#"{"pids":{"limit":64}}"#, &[("pids.max", "64")]),
            (r#"{"pids":{"limit":-1}}"#, &[("pids.max", "max")]),
            (r#"{"pids":{"limit":0}}"#, &[]),
            (r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9}]}"#, &[("hugetlb.2MB.max", "9")]),
            (r#"{"unified":{"memory.high":"5"}}"#, &[("memory.high", "5")]),
        ];
        for (json, expected) in table {
            assert_eq!(convert(json).unwrap(), pairs(expected), "{json}");
        }
    }

    #[test]
    fn resources_without_sense_are_refused() {
        for json in [
            r#"{"memory":{"limit":100,"swap":50}}"#,
            r#"{"memory":{"swap":50}}"#,
            r#"{"memory":{"limit":999,"checkBeforeUpdate":true}}"#,
            r#"{"unified":{"../../memory.max":"5"}}"#,
            r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":9}]}"#,
        ] {
            assert!(convert(json).is_err(), "{json}");
        }
    }

    /// Any limits: what is written is a file of the cgroup.
    #[test]
    fn fuzz_resources() {
        katana_fuzz::fuzz("resources", |input| {
            let current = input.edge().cast_signed();
            let Ok(resources) = serde_json::from_slice::<LinuxResources>(input.rest()) else { return };
            for setting in settings(&resources, Some(current)).unwrap_or_default() {
                assert!(!setting.file.contains('/') && !setting.file.is_empty(), "{:?}", setting.file);
            }
        });
    }
}
