//! The MP table, by which the guest finds its CPUs and its I/O APIC: Intel MultiProcessor Specification 1.4.

use crate::memory::{BIOS, IOAPIC, LOCAL_APIC};

/// Pins of the I/O APIC that KVM emulates.
pub const IOAPIC_PINS: u32 = 24;

/// Most vCPUs: the I/O APIC needs an id of its own after theirs, and 255 means "all".
pub const MAX_VCPUS: u8 = 254;

const APIC_VERSION: u8 = 0x14;
/// Enabled, and the bootstrap processor.
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;

/// Entry types, chapter 4.3.
mod entry {
    pub const PROCESSOR: u8 = 0;
    pub const BUS: u8 = 1;
    pub const IOAPIC: u8 = 2;
    pub const IO_INTERRUPT: u8 = 3;
    pub const LOCAL_INTERRUPT: u8 = 4;
}

/// Interrupt types, table 4-11.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

const ISA_BUS: u8 = 0;
const ISA_LINES: u8 = 16;
const ALL_APICS: u8 = 0xff;

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// Pointer and table for so many vCPUs, to be put at [`BIOS`].
pub fn build(vcpus: u8) -> Vec<u8> {
    let pointer_length = 16;
    let mut bytes = pointer(BIOS as u32 + pointer_length);
    bytes.extend(table(vcpus));
    bytes
}

/// The floating pointer structure, 4.1.
fn pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend_from_slice(&table.to_le_bytes());
    // One paragraph long, revision 1.4, checksum to come, no default configuration.
    bytes.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

/// The configuration table, 4.2 and 4.3.
fn table(vcpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    let mut bus = vec![entry::BUS, ISA_BUS];
    bus.extend_from_slice(b"ISA   ");
    entries.push(bus);
    let mut ioapic = vec![entry::IOAPIC, vcpus, APIC_VERSION, 1];
    ioapic.extend_from_slice(&IOAPIC.to_le_bytes());
    entries.push(ioapic);
    // Line and pin have the same number, as in KVM's default routes.
    for line in 0..ISA_LINES.min(IOAPIC_PINS as u8) {
        entries.push(vec![entry::IO_INTERRUPT, INT, 0, 0, ISA_BUS, line, vcpus, line]);
    }
    entries.push(vec![entry::LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![entry::LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);

    let mut bytes = b"PCMP".to_vec();
    let length = 44 + entries.iter().map(Vec::len).sum::<usize>();
    bytes.extend_from_slice(&(length as u16).to_le_bytes());
    // Revision 1.4, checksum to come.
    bytes.extend_from_slice(&[4, 0]);
    bytes.extend_from_slice(b"KATANA  MICROVM     ");
    // No OEM table.
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend(entries.into_iter().flatten());
    bytes[7] = checksum(&bytes);
    bytes
}

/// A processor entry, 4.3.1. Signature and features are for CPUs without CPUID.
fn processor(number: u8) -> Vec<u8> {
    let flags = CPU_ENABLED | if number == 0 { CPU_BOOTSTRAP } else { 0 };
    let mut bytes = vec![entry::PROCESSOR, number, APIC_VERSION, flags];
    bytes.extend_from_slice(&[0; 16]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ONE_MIB;

    fn entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[44..];
        let mut entries = Vec::new();
        while let Some(kind) = rest.first() {
            let (entry, next) = rest.split_at(if *kind == entry::PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            rest = next;
        }
        entries
    }

    #[test]
    fn checksums_lengths_and_counts_agree() {
        for vcpus in [1, 2, 3, 64, MAX_VCPUS] {
            let bytes = build(vcpus);
            assert!(bytes.len() as u64 <= ONE_MIB - BIOS);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!((checksum(pointer), checksum(table)), (0, 0));
            assert_eq!(&pointer[4..8], (BIOS as u32 + 16).to_le_bytes());
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let entries = entries(table);
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries.len());
            let cpus: Vec<_> = entries.iter().filter(|e| e[0] == entry::PROCESSOR).collect();
            assert_eq!(cpus.len(), usize::from(vcpus));
            assert_eq!(cpus.iter().filter(|cpu| cpu[3] == 3).count(), 1);
            assert!(cpus.iter().enumerate().all(|(number, cpu)| usize::from(cpu[1]) == number));
            let ioapic = entries.iter().find(|e| e[0] == entry::IOAPIC).unwrap();
            assert_eq!((ioapic[1], &ioapic[4..8]), (vcpus, &IOAPIC.to_le_bytes()[..]));
        }
    }
}
