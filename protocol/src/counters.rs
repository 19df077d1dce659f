//! What a VMM counts, and in which order it tells the shim.

/// One of the numbers that a VMM keeps of its machine since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Exits of vCPUs to the VMM: the guest read from a port.
    ExitPortRead,
    /// It wrote to a port.
    ExitPortWrite,
    /// It read from an address that is no memory.
    ExitMmioRead,
    /// It wrote to one.
    ExitMmioWrite,
    /// It halted, and KVM did not wait for it.
    ExitHalt,
    /// A signal ended the run, or KVM wants to be entered again.
    ExitInterrupted,
    /// Requests for shared files: to find a name.
    FileLookup,
    /// To forget what was found.
    FileForget,
    /// To read attributes.
    FileAttributes,
    /// To open, create or close a file or directory.
    FileOpen,
    /// To read.
    FileRead,
    /// To write.
    FileWrite,
    /// To list a directory.
    FileList,
    /// To bring what was written to the disk.
    FileSync,
    /// For extended attributes.
    FileExtended,
    /// All others.
    FileOther,
    /// Bytes of the answers to requests to read.
    FileBytesRead,
    /// Bytes of requests to write.
    FileBytesWritten,
    /// Requests to disks: to read.
    DiskRead,
    /// To write.
    DiskWrite,
    /// To bring what was written to the disk.
    DiskFlush,
    /// All others.
    DiskOther,
    /// Bytes read.
    DiskBytesRead,
    /// Bytes written.
    DiskBytesWritten,
    /// Packets that the VMM itself has moved to the guest; the kernel's (vhost-net) are not seen.
    NetPacketsReceived,
    /// And from it.
    NetPacketsSent,
    /// Their bytes.
    NetBytesReceived,
    /// And of those.
    NetBytesSent,
    /// Streams between guest and host that were opened.
    VsockConnections,
    /// Bytes of them to the guest.
    VsockBytesReceived,
    /// And from it.
    VsockBytesSent,
}

impl Counter {
    /// All of them, in the order in which their numbers are told.
    pub const ALL: [Self; 31] = [
        Self::ExitPortRead,
        Self::ExitPortWrite,
        Self::ExitMmioRead,
        Self::ExitMmioWrite,
        Self::ExitHalt,
        Self::ExitInterrupted,
        Self::FileLookup,
        Self::FileForget,
        Self::FileAttributes,
        Self::FileOpen,
        Self::FileRead,
        Self::FileWrite,
        Self::FileList,
        Self::FileSync,
        Self::FileExtended,
        Self::FileOther,
        Self::FileBytesRead,
        Self::FileBytesWritten,
        Self::DiskRead,
        Self::DiskWrite,
        Self::DiskFlush,
        Self::DiskOther,
        Self::DiskBytesRead,
        Self::DiskBytesWritten,
        Self::NetPacketsReceived,
        Self::NetPacketsSent,
        Self::NetBytesReceived,
        Self::NetBytesSent,
        Self::VsockConnections,
        Self::VsockBytesReceived,
        Self::VsockBytesSent,
    ];
    /// How many of them are exits, which come first: each vCPU counts its own.
    pub const EXITS: usize = 6;
}

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn the_order_is_that_of_the_variants() {
        assert!(Counter::ALL.iter().enumerate().all(|(index, counter)| *counter as usize == index));
        assert_eq!(Counter::ALL[Counter::EXITS], Counter::FileLookup);
    }
}
