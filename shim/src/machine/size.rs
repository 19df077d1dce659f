//! How large a pod's machine has to be: for the sum of its containers' limits.

use std::collections::HashMap;

use katana_config::Config;
use serde_json::{Map, Value};

use crate::spec::Spec;

/// More than any host has.
const NO_LIMIT_MIB: u64 = 1 << 40;
/// CFS bandwidth period where a limit names none, in microseconds.
const PERIOD: u64 = 100_000;

/// What may be used; 0 means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a processor.
    pub milli_cpus: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of memory in huge pages, which do not count as memory.
    pub huge_pages: u64,
}

impl Limits {
    /// A container's own.
    pub fn of_container(spec: &Spec) -> Self {
        let resources = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        Self::default().updated(resources.unwrap_or(&Map::new()))
    }

    /// What Kubernetes announces on a pod's first container: the sums over all of them.
    pub fn announced(spec: &Spec) -> Self {
        let annotated = |name: &str| {
            let value = spec.annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?;
            value.parse::<i64>().ok()
        };
        Self {
            milli_cpus: milli_cpus(annotated("cpu-quota"), annotated("cpu-period")),
            memory: positive(annotated("memory")),
            huge_pages: 0,
        }
    }

    /// Whether the memory is limited. "No limit" is at times written as a number close to 2^63.
    pub fn has_memory(&self) -> bool {
        self.memory > 0 && self.memory.div_ceil(1 << 20) < NO_LIMIT_MIB
    }

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            milli_cpus: self.milli_cpus.max(other.milli_cpus),
            memory: self.memory.max(other.memory),
            huge_pages: self.huge_pages.max(other.huge_pages),
        }
    }

    /// These limits with those in an OCI resources object in their place.
    #[must_use]
    pub fn updated(self, resources: &Map<String, Value>) -> Self {
        let number = |group: &str, name: &str| resources.get(group)?.get(name)?.as_i64();
        let (quota, memory) = (number("cpu", "quota"), number("memory", "limit"));
        let huge_pages = resources.get("hugepageLimits").and_then(Value::as_array);
        let huge_pages = huge_pages
            .into_iter()
            .flatten()
            .map(|limit| positive(limit.get("limit").and_then(Value::as_i64)));
        let huge_pages = huge_pages.fold(0, u64::saturating_add);
        Self {
            milli_cpus: quota
                .map_or(self.milli_cpus, |quota| milli_cpus(Some(quota), number("cpu", "period"))),
            memory: memory.map_or(self.memory, |memory| positive(Some(memory))),
            huge_pages: if huge_pages > 0 { huge_pages } else { self.huge_pages },
        }
    }
}

fn positive(value: Option<i64>) -> u64 {
    value.and_then(|value| u64::try_from(value).ok()).unwrap_or(0)
}

fn milli_cpus(quota: Option<i64>, period: Option<i64>) -> u64 {
    let period = Some(positive(period)).filter(|period| *period > 0).unwrap_or(PERIOD);
    positive(quota).saturating_mul(1000).div_ceil(period)
}

/// The limits of a pod.
#[derive(Debug, Default)]
pub struct Sum {
    announced: Limits,
    containers: HashMap<String, Limits>,
}

impl Sum {
    /// The pod's first container may announce the limits of those that are to come.
    pub fn announce(&mut self, limits: Limits) {
        self.announced = limits;
    }

    /// Sets a container's limits.
    pub fn set(&mut self, id: &str, limits: Limits) {
        self.containers.insert(id.to_owned(), limits);
    }

    /// A container's limits.
    pub fn get(&self, id: &str) -> Limits {
        self.containers.get(id).copied().unwrap_or_default()
    }

    /// From now on the containers' own limits count: somebody changes them.
    pub fn forget_announced(&mut self) {
        self.announced = Limits::default();
    }

    /// A container is gone.
    pub fn remove(&mut self, id: &str) {
        self.containers.remove(id);
    }

    /// All containers together.
    pub fn total(&self) -> Limits {
        let sum = |of: fn(&Limits) -> u64| self.containers.values().map(of).fold(0, u64::saturating_add);
        let (milli_cpus, memory) = (sum(|limits| limits.milli_cpus), sum(|limits| limits.memory));
        Limits { milli_cpus, memory, huge_pages: sum(|limits| limits.huge_pages) }.max(self.announced)
    }
}

/// What of a machine is switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Processors on line.
    pub vcpus: u8,
    /// Memory plugged beyond the base.
    pub plugged_mib: u64,
}

/// Between what sizes a machine can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Processors for a pod without limits.
    pub base_vcpus: u8,
    /// Processors that there are.
    pub max_vcpus: u8,
    /// Memory that can be plugged.
    pub pluggable_mib: u64,
}

impl Bounds {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        let hypervisor = &config.hypervisor;
        let machine = katana_template::machine(config);
        Self {
            base_vcpus: u8::try_from(hypervisor.default_vcpus.max(1)).unwrap_or(u8::MAX),
            max_vcpus: machine.max_vcpus,
            pluggable_mib: machine.pluggable_mib,
        }
    }

    /// The size for these limits: processors for the quota, and the memory on top of what the guest itself needs.
    pub fn size(&self, limits: &Limits) -> Size {
        let vcpus = u8::try_from(limits.milli_cpus.div_ceil(1000)).unwrap_or(u8::MAX);
        let memory = if limits.has_memory() { limits.memory.div_ceil(1 << 20) } else { 0 };
        let memory = memory.saturating_add(limits.huge_pages.div_ceil(1 << 20));
        Size {
            vcpus: vcpus.clamp(self.base_vcpus, self.max_vcpus),
            plugged_mib: memory.min(self.pluggable_mib),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(value: Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn limits_come_from_the_container_and_from_the_pods_annotations() {
        let resources = json!({"cpu": {"quota": 800_000, "period": 100_000}, "memory": {"limit": 64 << 20}});
        let pod = spec(json!({
            "annotations": {"io.kubernetes.cri.sandbox-cpu-quota": "75000", "io.kubernetes.cri.sandbox-cpu-period": "50000",
                            "io.kubernetes.cri.sandbox-memory": "4096"},
            "linux": {"resources": resources}}));
        assert_eq!(
            Limits::of_container(&pod),
            Limits { milli_cpus: 8000, memory: 64 << 20, ..Limits::default() }
        );
        assert_eq!(Limits::announced(&pod), Limits { milli_cpus: 1500, memory: 4096, ..Limits::default() });
        for hostile in [
            json!({"cpu": {"quota": -1, "period": 0}, "memory": {"limit": -1}}),
            json!({"cpu": 3, "memory": {"limit": "x"}}),
        ] {
            let spec = spec(json!({"linux": {"resources": hostile}}));
            assert_eq!(Limits::of_container(&spec), Limits::default());
        }
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let limits = Limits { milli_cpus: 500, memory: 1, ..Limits::default() };
        let update = |value: Value| limits.updated(value.as_object().unwrap());
        assert_eq!(
            update(json!({"memory": {"limit": 7}})),
            Limits { milli_cpus: 500, memory: 7, ..Limits::default() }
        );
        assert_eq!(
            update(json!({"cpu": {"quota": 300_000}})),
            Limits { milli_cpus: 3000, memory: 1, ..Limits::default() }
        );
        assert_eq!(update(json!({"cpu": {"quota": -1}, "memory": {"limit": -1}})), Limits::default());
        assert_eq!(update(json!({"cpu": {"shares": 2}})), limits);
        let sizes = json!([{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1GB", "limit": 0}]);
        assert_eq!(update(json!({"hugepageLimits": sizes})), Limits { huge_pages: 4 << 20, ..limits });
    }

    #[test]
    fn a_pod_is_the_sum_of_its_containers_or_what_was_announced() {
        let mut sum = Sum::default();
        sum.announce(Limits { milli_cpus: 1000, memory: 300, ..Limits::default() });
        sum.set("a", Limits { milli_cpus: 700, memory: 100, ..Limits::default() });
        sum.set("b", Limits { milli_cpus: 800, memory: u64::MAX, ..Limits::default() });
        assert_eq!(sum.total(), Limits { milli_cpus: 1500, memory: u64::MAX, ..Limits::default() });
        sum.remove("b");
        assert_eq!(sum.total(), Limits { milli_cpus: 1000, memory: 300, ..Limits::default() });
        sum.forget_announced();
        assert_eq!(sum.total(), Limits { milli_cpus: 700, memory: 100, ..Limits::default() });
    }

    #[test]
    fn a_machine_grows_within_its_bounds() {
        let bounds = Bounds { base_vcpus: 1, max_vcpus: 8, pluggable_mib: 1024 };
        let size = |milli_cpus, mib: u64| {
            let size = bounds.size(&Limits { milli_cpus, memory: mib << 20, ..Limits::default() });
            (size.vcpus, size.plugged_mib)
        };
        assert_eq!([size(0, 0), size(8000, 0), size(1001, 100)], [(1, 0), (8, 0), (2, 100)]);
        assert_eq!(size(100_000, 4096), (8, 1024));
        assert_eq!(
            bounds.size(&Limits { milli_cpus: 0, memory: u64::MAX >> 1, ..Limits::default() }).plugged_mib,
            0
        );
    }
}
