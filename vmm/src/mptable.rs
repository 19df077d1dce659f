//! The MP table, by which the guest finds its CPUs: Intel MultiProcessor Specification 1.4. There is no I/O APIC, since
//! nothing has interrupt lines.

use crate::memory::{BIOS, LOCAL_APIC};

const APIC_VERSION: u8 = 0x14;
/// Enabled, and the bootstrap processor.
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;

/// Type of a processor's entry, chapter 4.3.
const PROCESSOR: u8 = 0;

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
    let entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();

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
    let mut bytes = vec![PROCESSOR, number, APIC_VERSION, flags];
    bytes.extend_from_slice(&[0; 16]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ONE_MIB;
    use katana_protocol::vmm::MOST_VCPUS;

    #[test]
    fn checksums_lengths_and_counts_agree() {
        for vcpus in [1, 2, 3, 64, MOST_VCPUS] {
            let bytes = build(vcpus);
            assert!(bytes.len() as u64 <= ONE_MIB - BIOS);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!((checksum(pointer), checksum(table)), (0, 0));
            assert_eq!(&pointer[4..8], (BIOS as u32 + 16).to_le_bytes());
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let cpus: Vec<_> = table[44..].chunks(20).collect();
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), cpus.len());
            assert_eq!(cpus.len(), usize::from(vcpus));
            assert!(cpus.iter().all(|cpu| cpu[0] == PROCESSOR));
            assert_eq!(cpus.iter().filter(|cpu| cpu[3] == 3).count(), 1);
            assert!(cpus.iter().enumerate().all(|(number, cpu)| usize::from(cpu[1]) == number));
        }
    }
}
