//! CPUID: what KVM can offer on this host, with the VM's own topology in place of the host's.
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Bits in leaf 1.
mod leaf1 {
    pub const ECX_DTES64: u32 = 1 << 2;
    pub const ECX_MONITOR: u32 = 1 << 3;
    pub const ECX_DS_CPL: u32 = 1 << 4;
    pub const ECX_VMX: u32 = 1 << 5;
    pub const ECX_SMX: u32 = 1 << 6;
    pub const ECX_PDCM: u32 = 1 << 15;
    pub const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub const ECX_HYPERVISOR: u32 = 1 << 31;
    pub const EDX_DS: u32 = 1 << 21;
    pub const EDX_HTT: u32 = 1 << 28;
}
/// Bits in leaf 6.
mod leaf6 {
    pub const EAX_ARAT: u32 = 1 << 2;
}
/// Bits in leaf 7, index 0 and 1.
mod leaf7 {
    pub const EBX_SGX: u32 = 1 << 2;
    pub const EBX_RDT_M: u32 = 1 << 12;
    pub const EBX_RDT_A: u32 = 1 << 15;
    pub const EBX_PROCESSOR_TRACE: u32 = 1 << 25;
    pub const ECX_WAITPKG: u32 = 1 << 5;
    pub const ECX_TME: u32 = 1 << 13;
    pub const ECX_SGX_LC: u32 = 1 << 30;
    pub const EDX_SGX_KEYS: u32 = 1 << 1;
    pub const EDX_PCONFIG: u32 = 1 << 18;
    pub const EDX_ARCH_LBR: u32 = 1 << 19;
    /// KVM makes up the register on AMD processors, of which none has it.
    pub const EDX_ARCH_CAPABILITIES: u32 = 1 << 29;
    pub const EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    pub const EAX1_AMX_FP16: u32 = 1 << 21;
    pub const EDX1_AMX_COMPLEX: u32 = 1 << 8;
}
/// Bits in leaf 0x80000001.
mod leaf8000_0001 {
    pub const ECX_CMP_LEGACY: u32 = 1 << 1;
    pub const ECX_SVM: u32 = 1 << 2;
    pub const ECX_EXTAPIC: u32 = 1 << 3;
    pub const ECX_IBS: u32 = 1 << 10;
    pub const ECX_SKINIT: u32 = 1 << 12;
    pub const ECX_WDT: u32 = 1 << 13;
    pub const ECX_LWP: u32 = 1 << 15;
    pub const ECX_PERF_CORE: u32 = 1 << 23;
    pub const ECX_PERF_NB: u32 = 1 << 24;
    pub const ECX_PERF_TSC: u32 = 1 << 27;
    pub const ECX_PERF_LLC: u32 = 1 << 28;
    pub const ECX_MWAITX: u32 = 1 << 29;
}
/// Bits in leaf 0x80000007.
mod leaf8000_0007 {
    pub const EDX_INVARIANT_TSC: u32 = 1 << 8;
}
/// Leaves that are not there; the processor answers zeros for those below the highest one.
/// * 0x1F and 0x80000026 are other forms of 0xB; only that one is given.
/// * 0xA, 0x1C, 0x80000022 and 0x8000001B: counters and samples of what the processor does. KVM has them emulated by
///   the host's perf, and they reveal what neighbours do.
/// * 0xF and 0x10: shares of caches and memory, which are the host's to give.
/// * 0x12, 0x14, 0x1D and 0x1E: enclaves, processor trace, and AMX, whose state is not kept (`state.rs`).
/// * 0x8000000A and 0x8000001F: nested SVM, and memory encryption, which this is not.
const DROPPED: &[u32] = &[
    0xa,
    0xb,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1c,
    0x1d,
    0x1e,
    0x1f,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0022,
    0x8000_0026,
];
/// Bits that are clear, by leaf and index, in EAX, EBX, ECX and EDX: what belongs to the leaves that are not there, and
/// * MONITOR, MWAITX and WAITPKG: to wait for memory, which does nothing good where the host may run somebody else
///   meanwhile;
/// * PDCM, DTES64, DS_CPL and DS: what counters can, and their records in memory;
/// * VMX, SMX, SVM and SKINIT: to be a host;
/// * all of leaf 6 but ARAT, and of 0x80000007 but the invariant TSC: power, frequency and temperature.
const CLEARED: &[(u32, u32, [u32; 4])] = {
    use leaf1::{ECX_DS_CPL, ECX_DTES64, ECX_MONITOR, ECX_PDCM, ECX_SMX, ECX_VMX, EDX_DS};
    use leaf7::{
        EAX1_AMX_FP16, EBX_PROCESSOR_TRACE, EBX_RDT_A, EBX_RDT_M, EBX_SGX, ECX_SGX_LC, ECX_TME, ECX_WAITPKG,
        EDX_AMX, EDX_ARCH_LBR, EDX_PCONFIG, EDX_SGX_KEYS, EDX1_AMX_COMPLEX,
    };
    use leaf8000_0001 as extended;
    &[
        (1, 0, [0, 0, ECX_DTES64 | ECX_MONITOR | ECX_DS_CPL | ECX_VMX | ECX_SMX | ECX_PDCM, EDX_DS]),
        (6, 0, [!leaf6::EAX_ARAT, !0, !0, !0]),
        (
            7,
            0,
            [
                0,
                EBX_SGX | EBX_RDT_M | EBX_RDT_A | EBX_PROCESSOR_TRACE,
                ECX_WAITPKG | ECX_TME | ECX_SGX_LC,
                EDX_SGX_KEYS | EDX_PCONFIG | EDX_ARCH_LBR | EDX_AMX,
            ],
        ),
        (7, 1, [EAX1_AMX_FP16, 0, 0, EDX1_AMX_COMPLEX]),
        (
            0x8000_0001,
            0,
            [
                0,
                0,
                extended::ECX_SVM
                    | extended::ECX_EXTAPIC
                    | extended::ECX_IBS
                    | extended::ECX_SKINIT
                    | extended::ECX_WDT
                    | extended::ECX_LWP
                    | extended::ECX_PERF_CORE
                    | extended::ECX_PERF_NB
                    | extended::ECX_PERF_TSC
                    | extended::ECX_PERF_LLC
                    | extended::ECX_MWAITX,
                0,
            ],
        ),
        (0x8000_0007, 0, [!0, 0, !0, !leaf8000_0007::EDX_INVARIANT_TSC]),
    ]
};
/// How the names of AMD and Hygon begin, in EBX of leaf 0.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
/// Leaf 0xB, level types.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// One socket of single-threaded cores, one for each vCPU; the APIC id is the vCPU's number.
pub struct Topology {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Whether the guest may rely on the TSC where the processor says that it is invariant: Linux then reads it instead
    /// of kvm-clock, which KVM corrects.
    pub invariant_tsc: bool,
}

impl Topology {
    /// The leaves of one vCPU.
    pub fn apply(&self, supported: &[kvm_cpuid_entry2], vcpu: u8) -> Vec<kvm_cpuid_entry2> {
        let kept = supported.iter().filter(|leaf| !DROPPED.contains(&leaf.function)).copied();
        let amd = supported.iter().any(|leaf| leaf.function == 0 && AMD.contains(&leaf.ebx));
        let mut leaves: Vec<_> = kept.map(|leaf| self.adapt(clear(leaf, amd), vcpu, amd)).collect();
        leaves.extend(self.extended_topology(vcpu));
        leaves
    }

    /// The number of bits of an APIC id that distinguish cores.
    fn core_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }

    fn adapt(&self, mut leaf: kvm_cpuid_entry2, vcpu: u8, amd: bool) -> kvm_cpuid_entry2 {
        let (vcpus, vcpu) = (u32::from(self.vcpus), u32::from(vcpu));
        match leaf.function {
            0 => leaf.eax = leaf.eax.max(0xb),
            1 => {
                leaf.ebx = leaf.ebx & 0xffff | vcpus << 16 | vcpu << 24;
                leaf.ecx |= leaf1::ECX_HYPERVISOR | leaf1::ECX_TSC_DEADLINE;
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
            // Of AMD's: with HTT, that these are cores and not threads of one (APM, E.4.2). Old processors have no other
            // leaf that says it.
            0x8000_0001 => {
                leaf.ecx = leaf.ecx & !leaf8000_0001::ECX_CMP_LEGACY
                    | if amd && vcpus > 1 { leaf8000_0001::ECX_CMP_LEGACY } else { 0 };
            }
            // Of AMD's: the size of the core id and the number of cores (APM, E.4.7). KVM may offer zeros, which would be
            // one core. Reserved on Intel.
            0x8000_0008 => leaf.ecx = if amd { self.core_bits() << 12 | (vcpus - 1) } else { 0 },
            0x8000_0007 if !self.invariant_tsc => leaf.edx &= !leaf8000_0007::EDX_INVARIANT_TSC,
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

fn clear(mut leaf: kvm_cpuid_entry2, amd: bool) -> kvm_cpuid_entry2 {
    if amd && (leaf.function, leaf.index) == (7, 0) {
        leaf.edx &= !leaf7::EDX_ARCH_CAPABILITIES;
    }
    let cleared =
        CLEARED.iter().filter(|(function, index, _)| (*function, *index) == (leaf.function, leaf.index));
    for (_, _, [eax, ebx, ecx, edx]) in cleared {
        leaf.eax &= !eax;
        leaf.ebx &= !ebx;
        leaf.ecx &= !ecx;
        leaf.edx &= !edx;
    }
    leaf
}

#[cfg(test)]
mod tests;
