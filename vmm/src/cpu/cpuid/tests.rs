//! What guests see of hosts that are made up here, as KVM_GET_SUPPORTED_CPUID reports them.

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
        leaf(0, 0, [0xd, AMD[0], 2, 3]),
        leaf(1, 0, [0x806f8, 0x2010_0800, 1 << 5 | 1, 0]),
        leaf(0xb, 0, [0; 4]),
        leaf(0x8000_0008, 0, [0x3030, 1, 0x7007, 0]),
        leaf(0x8000_001e, 0, [9, 0x109, 1, 0]),
    ];
    let topology = Topology { vcpus: 3, invariant_tsc: true };
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
    let host = [
        leaf(0, 0, [0xd, AMD[0], 0, 0]),
        leaf(1, 0, [0, 0, 1 << 5, 1 << 28]),
        leaf(0x8000_0001, 0, [0, 0, 1 << 2 | 1 << 22 | 2, 0]),
    ];
    let leaves = Topology { vcpus: 1, invariant_tsc: true }.apply(&host, 0);
    assert_eq!(find(&leaves, 1, 0), [0, 1 << 16, leaf1::ECX_HYPERVISOR | leaf1::ECX_TSC_DEADLINE, 0]);
    assert_eq!(find(&leaves, 0x8000_0001, 0)[2], 1 << 22);
    assert_eq!(find(&leaves, 0xb, 1)[..2], [0, 1]);
}

#[test]
fn caches_are_shared_as_the_topology_says() {
    let host = [leaf(4, 0, [0xfc00_4121, 0, 0, 0]), leaf(4, 3, [0xfc1f_c163, 0, 0, 0])];
    let leaves = Topology { vcpus: 4, invariant_tsc: true }.apply(&host, 0);
    assert_eq!(find(&leaves, 4, 0)[0], 3 << 26 | 0x121);
    assert_eq!(find(&leaves, 4, 3)[0], 3 << 26 | 3 << 14 | 0x163);
}

/// What a host offers that has everything: of each leaf, what a guest must not see is clear, and nothing else.
#[test]
fn a_guest_has_no_counters_no_waiting_no_enclaves_and_is_no_host() {
    let all = [!0; 4];
    let leaves: Vec<_> =
        [1, 6, 7, 0xa, 0xf, 0x10, 0x12, 0x14, 0x1c, 0x1d, 0x1e, 0x8000_0001, 0x8000_0007, 0x8000_000a]
            .into_iter()
            .chain([0x8000_001b, 0x8000_001f, 0x8000_0022])
            .map(|function| leaf(function, 0, all))
            .chain([leaf(7, 1, all), leaf(7, 2, all)])
            .collect();
    let leaves = Topology { vcpus: 2, invariant_tsc: true }.apply(&leaves, 0);
    let cleared = |function, index| find(&leaves, function, index).map(|register| !register);
    let bits = |numbers: &[u32]| numbers.iter().fold(0, |bits, number| bits | 1 << number);
    // The numbers are those of the manuals (Intel SDM 2A, tables 3-8 and following; AMD APM 3, E.3 and E.4).
    assert_eq!(cleared(1, 0)[2..], [bits(&[2, 3, 4, 5, 6, 15]), bits(&[21])]);
    assert_eq!(find(&leaves, 6, 0), [bits(&[2]), 0, 0, 0]);
    assert_eq!(
        cleared(7, 0),
        [0, bits(&[2, 12, 15, 25]), bits(&[5, 13, 30]), bits(&[1, 18, 19, 22, 24, 25])]
    );
    assert_eq!(cleared(7, 1), [bits(&[21]), 0, 0, bits(&[8])]);
    assert_eq!(cleared(7, 2), [0; 4]);
    // Bit 1 is AMD's topology.
    assert_eq!(cleared(0x8000_0001, 0), [0, 0, bits(&[1, 2, 3, 10, 12, 13, 15, 23, 24, 27, 28, 29]), 0]);
    assert_eq!(find(&leaves, 0x8000_0007, 0), [0, !0, 0, bits(&[8])]);
    let left: Vec<_> = leaves.iter().map(|leaf| (leaf.function, leaf.index)).collect();
    let kept = [
        (1, 0),
        (6, 0),
        (7, 0),
        (0x8000_0001, 0),
        (0x8000_0007, 0),
        (7, 1),
        (7, 2),
        (0xb, 0),
        (0xb, 1),
        (0xb, 2),
    ];
    assert_eq!(left, kept);
}

#[test]
fn the_tsc_is_invariant_only_if_processor_and_host_say_so() {
    for (host, invariant_tsc, expected) in
        [(!0, true, 1 << 8), (!0, false, 0), (!(1 << 8), true, 0), (!(1 << 8), false, 0)]
    {
        let leaves = Topology { vcpus: 1, invariant_tsc }.apply(&[leaf(0x8000_0007, 0, [0, 0, 0, host])], 0);
        assert_eq!(find(&leaves, 0x8000_0007, 0)[3], expected);
    }
}

#[test]
fn amd_has_no_register_of_intels_capabilities() {
    for (name, expected) in [(*b"Auth", 0), (*b"Hygo", 0), (*b"Genu", 1 << 29)] {
        let host = [leaf(0, 0, [0xd, u32::from_le_bytes(name), 0, 0]), leaf(7, 0, [0, 0, 0, 1 << 29])];
        assert_eq!(find(&Topology { vcpus: 1, invariant_tsc: true }.apply(&host, 0), 7, 0)[3], expected);
    }
}

const NUMBERS: [u8; 7] = [1, 2, 3, 6, 64, 65, 254];
/// "Genu", the first part of Intel's name in leaf 0.
const INTEL: u32 = u32::from_le_bytes(*b"Genu");

/// Two sockets with six cores, whose ids have holes, seen from the processor with id 20; the newest with leaf 0x1F.
fn intel(id: u32) -> Vec<kvm_cpuid_entry2> {
    let level = |function, index: u32, shift, count, kind: u32| {
        leaf(function, index, [shift, count, kind << 8 | index, id])
    };
    vec![
        leaf(0, 0, [0x1f, INTEL, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x606a6, id << 24 | 0x0020_0800, 1, leaf1::EDX_HTT]),
        // Two levels of which a core has its own, for two threads, and one that 32 ids share.
        leaf(4, 0, [15 << 26 | 1 << 14 | 0x121, 0, 63, 0]),
        leaf(4, 2, [15 << 26 | 1 << 14 | 0x143, 0, 1023, 0]),
        leaf(4, 3, [15 << 26 | 31 << 14 | 0x163, 0, 0xbfff, 4]),
        leaf(4, 4, [0; 4]),
        level(0xb, 0, 1, 2, 1),
        level(0xb, 1, 5, 12, 2),
        level(0x1f, 0, 1, 2, 1),
        level(0x1f, 1, 4, 12, 2),
        level(0x1f, 2, 5, 24, 5),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0]),
        // KVM tells of Intel's bits against speculation by AMD's names (IBPB, IBRS, STIBP, SSBD).
        leaf(0x8000_0008, 0, [0x3934, 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24, 0, 0]),
    ]
}

/// A socket of 12 cores with two threads, on two nodes, seen from the thread with id 0x53.
fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0x10, AMD[0], 0x444d_4163, 0x6974_6e65]),
        leaf(1, 0, [0x00a1_0f11, 0x5318_0800, 1, leaf1::EDX_HTT]),
        leaf(0xb, 0, [1, 2, 0x100, 0x53]),
        leaf(0xb, 1, [7, 24, 0x201, 0x53]),
        leaf(0x8000_0001, 0, [0, 0, 1 << 22 | leaf8000_0001::ECX_CMP_LEGACY, 0]),
        leaf(0x8000_0008, 0, [0x3030, 1 << 12, 0x0001_7017, 0]),
        leaf(0x8000_001d, 0, [1 << 14 | 0x121, 0, 63, 0]),
        leaf(0x8000_001d, 2, [1 << 14 | 0x143, 0, 1023, 0]),
        leaf(0x8000_001d, 3, [11 << 14 | 0x163, 0, 0x7fff, 1]),
        leaf(0x8000_001e, 0, [0x53, 0x0129, 0x0101, 0]),
        leaf(0x8000_0026, 0, [1, 2, 0x100, 0x53]),
    ]
}

/// Of 2009: neither TOPOEXT nor a bit against speculation; KVM reports no topology (Linux 6.2 and newer).
fn old_amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [5, AMD[0], 0x444d_4163, 0x6974_6e65]),
        leaf(1, 0, [0x0010_0f42, 0x0306_0800, 1, leaf1::EDX_HTT]),
        leaf(0x8000_0001, 0, [0, 0, 0x1f1, 0]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0, 0]),
    ]
}

/// Bits of an id that distinguish so many.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// What is asked of every host: all leaves tell the same id, that of the vCPU, and one socket of cores.
fn expect_topology(host: &[kvm_cpuid_entry2], vcpus: u8, vcpu: u8) -> Vec<kvm_cpuid_entry2> {
    let leaves = Topology { vcpus, invariant_tsc: true }.apply(host, vcpu);
    let (count, id) = (u32::from(vcpus), u32::from(vcpu));
    let bits = bits_for(count);
    assert!(find(&leaves, 0, 0)[0] >= 0xb);
    let [_, ebx, _, edx] = find(&leaves, 1, 0);
    assert_eq!((ebx >> 24, ebx >> 16 & 0xff, ebx & 0xffff), (id, count, 0x800));
    assert_eq!(edx & leaf1::EDX_HTT != 0, count > 1);
    let levels = [[0, 1, 0x100, id], [bits, count, 0x201, id], [0, 0, 2, id]];
    let of_level = |index| find(&leaves, 0xb, index);
    assert_eq!([0, 1, 2].map(of_level), levels);
    assert_eq!(leaves.iter().filter(|leaf| leaf.function == 0xb).count(), levels.len());
    assert!(!leaves.iter().any(|leaf| [0x1f, 0x8000_0026].contains(&leaf.function)));
    leaves
}

#[test]
fn ids_with_holes_of_an_intel_host_are_not_its_guests() {
    for (vcpus, id) in NUMBERS.into_iter().flat_map(|vcpus| [0, 8, 20, 0x51].map(|id| (vcpus, id))) {
        for vcpu in 0..vcpus {
            let leaves = expect_topology(&intel(id), vcpus, vcpu);
            let bits = bits_for(vcpus.into());
            // Six bits for the cores of a package, however many there are; and what shares a cache.
            let cores = ((1 << bits) - 1).min(63);
            let caches = [0, 2, 3].map(|index| find(&leaves, 4, index)[0]);
            assert_eq!(caches.map(|cache| cache >> 26), [cores; 3]);
            assert_eq!(caches.map(|cache| cache >> 14 & 0xfff), [0, 0, (1 << bits) - 1]);
            assert_eq!(caches.map(|cache| cache & 0x3fff), [0x121, 0x143, 0x163]);
            assert_eq!(find(&leaves, 4, 4), [0; 4]);
            assert_eq!(find(&leaves, 0x8000_0001, 0)[2], 0x121);
        }
    }
}

#[test]
fn an_intel_guest_has_nothing_where_amd_counts_cores() {
    let leaves = expect_topology(&intel(20), 6, 5);
    assert_eq!(find(&leaves, 0x8000_0008, 0), [0x3934, 0x0100_d000, 0, 0]);
}

#[test]
fn ids_with_holes_of_an_amd_host_are_not_its_guests() {
    for vcpus in NUMBERS {
        for vcpu in 0..vcpus {
            let leaves = expect_topology(&amd(), vcpus, vcpu);
            let (count, id) = (u32::from(vcpus), u32::from(vcpu));
            let legacy = if count > 1 { leaf8000_0001::ECX_CMP_LEGACY } else { 0 };
            assert_eq!(find(&leaves, 0x8000_0001, 0)[2], 1 << 22 | legacy);
            assert_eq!(find(&leaves, 0x8000_0008, 0)[2], bits_for(count) << 12 | (count - 1));
            let caches = [0, 2, 3].map(|index| find(&leaves, 0x8000_001d, index)[0]);
            assert_eq!(caches, [0x121, 0x143, (count - 1) << 14 | 0x163]);
            assert_eq!(find(&leaves, 0x8000_001e, 0), [id, id, 0, 0]);
        }
    }
}

/// HTT alone would be threads of one core, and no number of cores would be one.
#[test]
fn an_old_amd_guest_has_cores_where_kvm_reports_none() {
    for vcpus in NUMBERS {
        for vcpu in 0..vcpus {
            let leaves = expect_topology(&old_amd(), vcpus, vcpu);
            let count = u32::from(vcpus);
            let legacy = if count > 1 { leaf8000_0001::ECX_CMP_LEGACY } else { 0 };
            assert_eq!(find(&leaves, 0x8000_0001, 0)[2], 0x1f1 | legacy);
            assert_eq!(find(&leaves, 0x8000_0008, 0), [0x3030, 0, bits_for(count) << 12 | (count - 1), 0]);
        }
    }
}
