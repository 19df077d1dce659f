//! Shim and VMM: requests and events as JSON over one `SOCK_SEQPACKET` pair, file descriptors beside them.
//!
//! The VMM opens nothing itself: whatever it works with arrives here. One packet is one message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The descriptor number at which the VMM finds its end of the socket pair.
pub const CONTROL_FD: RawFd = 3;
/// Longest message, bytes. Console tails are cut to fit.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors beside one message.
pub const MAX_FDS: usize = 2 * MOST_NET_PAIRS;
/// Pairs of queues that a NIC can have.
pub const MOST_NET_PAIRS: usize = 8;

/// The most vCPUs of a machine: an even number whose APIC ids, of 8 bits in the table by which the guest finds its
/// CPUs, all stay below 255, which means "all" (Intel MultiProcessor Specification 1.4, 4.3.1).
pub const MOST_VCPUS: u8 = 254;

/// The machine to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// vCPUs on line after boot, at least 1.
    pub vcpus: u8,
    /// vCPUs that there can be; see [`Request::AddVcpus`].
    pub max_vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Memory that can be plugged on top of it, in MiB.
    pub pluggable_mib: u64,
    /// The whole kernel command line but for what the VMM itself must add (console, root device).
    pub kernel_params: String,
    /// Number of virtio-net slots, in which the guest sees no NIC until [`Request::AttachNet`].
    /// They are the last functions on the PCI bus, in the order of their numbers.
    pub net_slots: u8,
    /// Number of virtio-blk slots, in which the guest sees no disk until [`Request::AttachDisk`]. They come right
    /// before the network's on the PCI bus, in the order of their numbers.
    pub disk_slots: u8,
    /// Whether the guest may take its time from the TSC alone, without asking KVM: only if the host's kernel does.
    pub invariant_tsc: bool,
    /// The guest's vsock context id, at least 3; no other guest on the host has the same.
    pub guest_cid: u32,
    /// What to do with the template.
    pub template: Template,
    /// Pass every console line on to standard error as well, and boot the guest's kernel verbosely.
    pub debug: bool,
}

/// What a machine has to do with a template: a machine of the same shape that has booted and waits for its pod, in a
/// file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Template {
    /// Nothing.
    None,
    /// It is written to the file when the guest is up, and answered by [`Event::TemplateMade`].
    Make,
    /// The machine is restored from it, instead of booting. If there is any doubt about the file, it boots, and says
    /// why in the log.
    Use,
}

/// The time of modification of a template's file, in seconds since 1970, that says it has not been written to since it
/// was complete. Whoever asked for the template sets it.
pub const SEALED: i64 = 1;

/// What the shim asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first message. Descriptors, in this order: /dev/kvm, the kernel (ELF), the guest image (erofs), the
    /// pod's shared directory, the template's file if the machine has to do with one, and the directory of the cgroup
    /// (v2) that it is to live in if there is one. The VMM jails itself, boots, and answers [`Event::Running`] or
    /// [`Event::Failed`].
    Boot(Machine),
    /// Connect to a vsock port in the guest. Descriptor: one end of a Unix stream pair that becomes the
    /// connection; it is closed when the guest refuses.
    Connect {
        /// Port in the guest.
        port: u32,
    },
    /// Has the guest plug or unplug memory until it has this much beyond its base; more than is pluggable counts as all
    /// of it. Answered by [`Event::MemoryPlugged`] when the guest has followed.
    PlugMemory {
        /// In MiB.
        mib: u64,
    },
    /// Makes vCPUs until there are so many, which the guest can then bring on line. Answered by [`Event::Done`].
    AddVcpus {
        /// At most as many as the machine can have.
        count: u8,
    },
    /// Gives a disk to a slot, in which the guest then finds it if it looks. Descriptor: the disk or image file.
    /// Answered by [`Event::Done`].
    AttachDisk {
        /// Slot number from 0.
        slot: u8,
        /// Refuse writes.
        read_only: bool,
    },
    /// Takes the disk out of a slot; the guest has released it. Answered by [`Event::Done`].
    DetachDisk {
        /// Slot number from 0.
        slot: u8,
    },
    /// Gives a tap device to a network slot, in which the guest then finds a NIC if it looks. Descriptors: the tap's
    /// queues, and as many fresh /dev/vhost-net if the host's kernel is to move the packets. Answered by
    /// [`Event::Done`].
    AttachNet {
        /// Slot number from 0.
        slot: u8,
        /// The NIC's address.
        mac: [u8; 6],
        /// How many queues of the tap there are, at most [`MOST_NET_PAIRS`].
        pairs: u8,
    },
    /// Makes a thread that does nothing, by whose id clients of the host know a container. Answered by
    /// [`Event::PlaceholderAdded`], or by [`Event::Done`] with an error.
    AddPlaceholder,
    /// Ends such a thread. Answered by [`Event::Done`].
    RemovePlaceholder {
        /// Its id in the VMM's pid namespace.
        thread: i32,
    },
    /// Asks what the VMM has counted. Answered by [`Event::Counts`].
    Counts,
    /// Asks for the guest's console. Answered by [`Event::Console`].
    Console,
}

/// What the VMM reports to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The jailed process, by its pid in the shim's pid namespace; a child of the shim. The process that the
    /// shim spawned has done its part and ends.
    Jailed {
        /// Process id.
        pid: i32,
    },
    /// The vCPUs run. Descriptor: the machine in the kernel (KVM_CREATE_VM). Whoever closes it last waits, for tens of
    /// milliseconds, until the kernel has torn it down; the VMM, whose end others wait for, need not be the one.
    Running,
    /// The VM cannot be started; the VMM ends. One line that names what failed, on what, and why.
    Failed(String),
    /// The guest connected to a port of the host. Descriptor: the connection. To refuse it, close it.
    Connection {
        /// Port on the host.
        port: u32,
    },
    /// The guest has as much memory beyond its base as was last asked for.
    MemoryPlugged {
        /// In MiB, rounded up to whole blocks.
        mib: u64,
    },
    /// There is a thread that does nothing.
    PlaceholderAdded {
        /// Its id in the VMM's pid namespace.
        thread: i32,
    },
    /// What the VMM has counted: a number for each of [`crate::counters::Counter::ALL`].
    Counts(Vec<u64>),
    /// The last lines of the guest's console.
    Console(String),
    /// The answer to a request to attach or detach, or about a thread or vCPUs: an error text if it failed.
    Done(Option<String>),
    /// The template has been made; or why it cannot be made, or is refused. The VM runs in any case.
    TemplateMade(Option<String>),
    /// The VM ended; the VMM ends as well.
    Exit {
        /// Why.
        reason: ExitReason,
        /// The last lines of the guest's console.
        console: String,
    },
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest reset or powered off its machine.
    Shutdown,
    /// The shim closed its end of the control socket.
    Stopped,
    /// The guest's kernel panicked; the line that says so.
    Panic(String),
    /// A triple fault.
    TripleFault,
    /// The VMM itself could not continue.
    Internal(String),
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest shut down"),
            Self::Stopped => f.write_str("the VM was stopped"),
            Self::Panic(line) => write!(f, "the guest's kernel panicked: {line}"),
            Self::TripleFault => f.write_str("the guest's CPU met a triple fault"),
            Self::Internal(why) => write!(f, "the VMM failed: {why}"),
        }
    }
}

/// Why a message could not be passed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("control socket: {0}")]
    Socket(#[from] io::Error),
    /// The other end is gone.
    #[error("control socket: closed by the other end")]
    Closed,
    /// The message does not parse or does not fit.
    #[error("control message: {0}")]
    Message(#[from] serde_json::Error),
    /// Longer than [`MAX_MESSAGE`] or more than [`MAX_FDS`] descriptors.
    #[error("control message too long")]
    TooLong,
}

/// Sends one message with its descriptors.
///
/// # Errors
/// [`Error::TooLong`], or what the socket says; `WouldBlock` on a full non-blocking socket.
pub fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(Error::TooLong);
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let iov = [IoSlice::new(&bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &iov, rights, flags, None).map_err(io::Error::from)?;
    Ok(())
}

/// A message as it has arrived.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// Its descriptors; none if any were cut off.
    pub fds: Vec<OwnedFd>,
    /// Whether there were more than this process may open, or than [`MAX_FDS`]. A lack of them is the receiver's, where
    /// a message without any is the sender's doing.
    pub cut_off: bool,
}

/// [`receive_any`] where it makes no difference why a message has no descriptors.
///
/// # Errors
/// Those of [`receive_any`].
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), Error> {
    receive_any(socket).map(|received| (received.message, received.fds))
}

/// Receives one message with its descriptors. Where this process may not open as many, there are none, and the sender
/// continues.
///
/// # Errors
/// [`Error::Closed`] at the end, [`Error::TooLong`] for a message that was cut, or what the socket says.
pub fn receive_any<T: DeserializeOwned>(socket: impl AsFd) -> Result<Received<T>, Error> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [const { MaybeUninit::uninit() }; cmsg_space!(ScmRights(MAX_FDS))];
    // nix shows nothing of descriptors of which some are missing, and leaves the others open.
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let message =
        recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC).map_err(io::Error::from)?;
    let mut fds = Vec::new();
    for control in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = control {
            fds.extend(rights);
        }
    }
    let (length, flags) = (message.bytes, message.flags);
    if length == 0 {
        return Err(Error::Closed);
    }
    if flags.contains(ReturnFlags::TRUNC) {
        return Err(Error::TooLong);
    }
    // `scm_detach_fds` (net/core/scm.c) stops at the first that it cannot make.
    let cut_off = flags.contains(ReturnFlags::CTRUNC);
    if cut_off {
        fds.clear();
    }
    Ok(Received { message: serde_json::from_slice(&bytes[..length])?, fds, cut_off })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::fs::File;
    use std::io::Read;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn message_and_descriptors_arrive_together() {
        let (a, b) = pair();
        let file = File::open("/proc/self/comm").unwrap();
        send(&a, &Request::Connect { port: 7 }, &[file.as_fd()]).unwrap();
        let (request, mut fds): (Request, _) = receive(&b).unwrap();
        assert_eq!(request, Request::Connect { port: 7 });
        let mut text = String::new();
        File::from(fds.remove(0)).read_to_string(&mut text).unwrap();
        assert!(!text.is_empty() && fds.is_empty());
    }

    #[test]
    fn a_message_whose_descriptors_have_no_room_arrives_without() {
        let (a, b) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        // More than `send` lets through, which are cut as well.
        let many = vec![writer.as_raw_fd(); MAX_FDS + 5];
        let bytes = serde_json::to_vec(&Request::AddPlaceholder).unwrap();
        let rights = [ControlMessage::ScmRights(&many)];
        sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::empty(), None).unwrap();
        let Received { message, fds, cut_off } = receive_any::<Request>(&b).unwrap();
        assert_eq!((message, fds.len(), cut_off), (Request::AddPlaceholder, 0, true));
        send(&a, &Request::AddPlaceholder, &[]).unwrap();
        let Received { message, fds, cut_off } = receive_any::<Request>(&b).unwrap();
        assert_eq!((message, fds.len(), cut_off), (Request::AddPlaceholder, 0, false));
        drop(writer);
        // The end: no copy of the descriptor was kept.
        assert_eq!(File::from(reader).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_closed_peer_is_distinguished_from_garbage() {
        let (a, b) = pair();
        nix::sys::socket::send(a.as_raw_fd(), b"{", MsgFlags::empty()).unwrap();
        assert!(matches!(receive::<Request>(&b), Err(Error::Message(_))));
        drop(a);
        assert!(matches!(receive::<Request>(&b), Err(Error::Closed)));
    }

    /// Each end hears anything from the other.
    #[test]
    fn fuzz_control() {
        let (a, b) = pair();
        katana_fuzz::fuzz("control", |input| {
            let bytes = input.rest();
            let again = |message: &[u8]| {
                nix::sys::socket::send(a.as_raw_fd(), message, MsgFlags::empty()).unwrap();
            };
            // An empty message is the end.
            if bytes.is_empty() {
                return;
            }
            again(bytes);
            if let Ok((request, fds)) = receive::<Request>(&b) {
                assert!(fds.is_empty());
                send(&a, &request, &[]).unwrap();
                assert_eq!(receive::<Request>(&b).unwrap().0, request);
            }
            again(bytes);
            if let Ok((event, _)) = receive::<Event>(&b) {
                send(&a, &event, &[]).unwrap();
                assert_eq!(receive::<Event>(&b).unwrap().0, event);
            }
        });
    }
}
