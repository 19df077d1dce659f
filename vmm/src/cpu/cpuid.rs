//! CPUID: what KVM can offer on this host, with the VM's own topology in place of the host's.
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Bits in leaf 1.
mod leaf1 {
    pub const ECX_VMX: u32 = 1 << 5;
    pub const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub const ECX_HYPERVISOR: u32 = 1 << 31;
    pub const EDX_HTT: u32 = 1 << 28;
}
/// Bits in leaf 0x80000001.
mod leaf8000_0001 {
    pub const ECX_CMP_LEGACY: u32 = 1 << 1;
    pub const ECX_SVM: u32 = 1 << 2;
    pub const ECX_PERF_CORE: u32 = 1 << 23;
    pub const ECX_PERF_NB: u32 = 1 << 24;
}
/// Leaf 0xB, level types.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// One socket of single-threaded cores, one for each vCPU; the APIC id is the vCPU's number.
pub struct Topology {
    /// Number of vCPUs.
    pub vcpus: u8,
}

impl Topology {
    /// The leaves of one vCPU.
    pub fn apply(&self, supported: &[kvm_cpuid_entry2], vcpu: u8) -> Vec<kvm_cpuid_entry2> {
        // 0x1F and 0x80000026 are other forms of 0xB; only that one is given. Without 0xA and 0x80000022 there
        // are no performance counters, and without 0x8000000A there is no nested SVM.
        let dropped = [0xb, 0x1f, 0x8000_0026, 0xa, 0x8000_0022, 0x8000_000a];
        let kept = supported.iter().filter(|leaf| !dropped.contains(&leaf.function)).copied();
        let mut leaves: Vec<_> = kept.map(|leaf| self.adapt(leaf, vcpu)).collect();
        leaves.extend(self.extended_topology(vcpu));
        leaves
    }

    /// The number of bits of an APIC id that tell cores apart.
    fn core_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }

    fn adapt(&self, mut leaf: kvm_cpuid_entry2, vcpu: u8) -> kvm_cpuid_entry2 {
        let (vcpus, vcpu) = (u32::from(self.vcpus), u32::from(vcpu));
        match leaf.function {
            0 => leaf.eax = leaf.eax.max(0xb),
            1 => {
                leaf.ebx = leaf.ebx & 0xffff | vcpus << 16 | vcpu << 24;
                leaf.ecx = leaf.ecx & !leaf1::ECX_VMX | leaf1::ECX_HYPERVISOR | leaf1::ECX_TSC_DEADLINE;
                leaf.edx = leaf.edx & !leaf1::EDX_HTT | if vcpus > 1 { leaf1::EDX_HTT } else { 0 };
            }
            // Deterministic caches: the last level is shared by all cores, the others by none.
            4 if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << self.core_bits()) - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14 | ((1 << self.core_bits()) - 1) << 26;
            }
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { vcpus - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14;
            }
            0x8000_0001 => {
                use leaf8000_0001::{ECX_CMP_LEGACY, ECX_PERF_CORE, ECX_PERF_NB, ECX_SVM};
                leaf.ecx &= !(ECX_SVM | ECX_PERF_CORE | ECX_PERF_NB | ECX_CMP_LEGACY);
                // An AMD bit; Intel CPUs have it clear.
                if vcpus > 1 && leaf.ecx & 1 << 22 != 0 {
                    leaf.ecx |= ECX_CMP_LEGACY;
                }
            }
            // Size of the core id and number of cores; reserved on Intel, where it stays 0.
            0x8000_0008 if leaf.ecx != 0 || leaf.ebx != 0 => {
                leaf.ecx = leaf.ecx & !0xf0ff | self.core_bits() << 12 | (vcpus - 1);
            }
            // Extended APIC id, compute unit of one thread, the only node.
            0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (vcpu, vcpu & 0xff, 0),
            _ => {}
        }
        leaf
    }

    /// Leaf 0xB: one thread to a core, all cores in one package.
    fn extended_topology(&self, vcpu: u8) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: u32::from(vcpu),
            ..Default::default()
        };
        let vcpus = u32::from(self.vcpus);
        [level(0, 0, 1, LEVEL_SMT), level(1, self.core_bits(), vcpus, LEVEL_CORE), level(2, 0, 0, 0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let leaf = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap();
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_everywhere() {
        let host = [
            leaf(0, 0, [0xd, 1, 2, 3]),
            leaf(1, 0, [0x806f8, 0x2010_0800, 1 << 5 | 1, 0]),
            leaf(0xb, 0, [0; 4]),
            leaf(0x8000_0008, 0, [0x3030, 1, 0x7007, 0]),
            leaf(0x8000_001e, 0, [9, 0x109, 1, 0]),
        ];
        let topology = Topology { vcpus: 3 };
        for vcpu in 0..3 {
            let leaves = topology.apply(&host, vcpu);
            let id = u32::from(vcpu);
            assert_eq!(find(&leaves, 1, 0)[1], id << 24 | 3 << 16 | 0x800);
            assert_eq!(find(&leaves, 1, 0)[2], leaf1::ECX_HYPERVISOR | leaf1::ECX_TSC_DEADLINE | 1);
            assert_eq!(find(&leaves, 0xb, 0), [0, 1, 0x100, id]);
            assert_eq!(find(&leaves, 0xb, 1), [2, 3, 0x201, id]);
            assert_eq!(find(&leaves, 0xb, 2), [0, 0, 2, id]);
            assert_eq!(find(&leaves, 0x8000_0008, 0)[2], 0x2002);
            assert_eq!(find(&leaves, 0x8000_001e, 0), [id, id, 0, 0]);
        }
    }

    #[test]
    fn one_vcpu_is_no_hyperthread_and_nothing_is_nested() {
        let host =
            [leaf(1, 0, [0, 0, 1 << 5, 1 << 28]), leaf(0x8000_0001, 0, [0, 0, 1 << 2 | 1 << 22 | 2, 0])];
        let leaves = Topology { vcpus: 1 }.apply(&host, 0);
        assert_eq!(find(&leaves, 1, 0), [0, 1 << 16, leaf1::ECX_HYPERVISOR | leaf1::ECX_TSC_DEADLINE, 0]);
        assert_eq!(find(&leaves, 0x8000_0001, 0)[2], 1 << 22);
        assert_eq!(find(&leaves, 0xb, 1)[..2], [0, 1]);
    }

    #[test]
    fn caches_are_shared_as_the_topology_says() {
        let host = [leaf(4, 0, [0xfc00_4121, 0, 0, 0]), leaf(4, 3, [0xfc1f_c163, 0, 0, 0])];
        let leaves = Topology { vcpus: 4 }.apply(&host, 0);
        assert_eq!(find(&leaves, 4, 0)[0], 3 << 26 | 0x121);
        assert_eq!(find(&leaves, 4, 3)[0], 3 << 26 | 3 << 14 | 0x163);
    }
}
