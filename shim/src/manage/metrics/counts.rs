//! What the VMM has counted.

use katana_metrics::text::{Kind, Text};
use katana_protocol::counters::Counter as C;

/// A family's name after "kata_hypervisor_", what it is, the name of its label, and the label's values.
type Row = (&'static str, &'static str, &'static str, &'static [(&'static str, C)]);

const ROWS: [Row; 9] = [
    (
        "exits_total",
        "Exits of vCPUs that the VMM answered; those that KVM answers alone are not seen.",
        "kind",
        &[
            ("port_read", C::ExitPortRead),
            ("port_write", C::ExitPortWrite),
            ("mmio_read", C::ExitMmioRead),
            ("mmio_write", C::ExitMmioWrite),
            ("halt", C::ExitHalt),
            ("interrupted", C::ExitInterrupted),
        ],
    ),
    (
        "file_requests_total",
        "Requests for shared files (virtio-fs).",
        "kind",
        &[
            ("lookup", C::FileLookup),
            ("forget", C::FileForget),
            ("attributes", C::FileAttributes),
            ("open", C::FileOpen),
            ("read", C::FileRead),
            ("write", C::FileWrite),
            ("list", C::FileList),
            ("sync", C::FileSync),
            ("extended_attributes", C::FileExtended),
            ("other", C::FileOther),
        ],
    ),
    (
        "file_bytes_total",
        "Bytes of shared files that the guest read and wrote.",
        "direction",
        &[("read", C::FileBytesRead), ("written", C::FileBytesWritten)],
    ),
    (
        "disk_requests_total",
        "Requests to disks (virtio-blk).",
        "kind",
        &[("read", C::DiskRead), ("write", C::DiskWrite), ("flush", C::DiskFlush), ("other", C::DiskOther)],
    ),
    (
        "disk_bytes_total",
        "Bytes of disks that the guest read and wrote.",
        "direction",
        &[("read", C::DiskBytesRead), ("written", C::DiskBytesWritten)],
    ),
    (
        "net_packets_total",
        "Packets that the VMM moved; those that the kernel moves (vhost-net) are in kata_hypervisor_netdev only.",
        "direction",
        &[("received", C::NetPacketsReceived), ("sent", C::NetPacketsSent)],
    ),
    (
        "net_bytes_total",
        "Bytes of these packets.",
        "direction",
        &[("received", C::NetBytesReceived), ("sent", C::NetBytesSent)],
    ),
    (
        "vsock_connections_total",
        "Streams between guest and host: the agent's, and those of containers.",
        "",
        &[("", C::VsockConnections)],
    ),
    (
        "vsock_bytes_total",
        "Bytes of these streams that the guest received and sent.",
        "direction",
        &[("received", C::VsockBytesReceived), ("sent", C::VsockBytesSent)],
    ),
];

/// Writes all of them.
pub fn write(text: &mut Text, counts: &[(C, u64)]) {
    for (name, help, label, values) in ROWS {
        let mut family = text.family(&format!("kata_hypervisor_{name}"), Kind::Counter, help);
        for (value, counter) in values {
            let count = counts.iter().find(|(found, _)| found == counter).map(|(_, count)| count);
            let labels = [(label, *value)];
            family.add_known(if label.is_empty() { &[] } else { &labels }, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_one_line() {
        let counts: Vec<_> = C::ALL.into_iter().zip(100..).collect();
        let mut text = Text::default();
        write(&mut text, &counts);
        let text = text.finish();
        for (counter, count) in counts {
            let end = format!(" {count}");
            assert_eq!(text.lines().filter(|line| line.ends_with(&end)).count(), 1, "{counter:?}: {text}");
        }
    }
}
