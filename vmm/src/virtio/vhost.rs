//! vhost-net (linux/vhost.h): the host's kernel moves packets between a tap and the queues of a NIC, and neither a kick
//! nor an interrupt passes through this process.
//!
//! Guest memory that is not plugged is not mapped here, so the kernel cannot reach it for the guest either.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::{Activation, VirtQueue};
use crate::memory::GuestMemory;

const VHOST_SET_OWNER: libc::c_ulong = 0xaf01;
const VHOST_GET_FEATURES: libc::c_ulong = 0x8008_af00;
const VHOST_SET_FEATURES: libc::c_ulong = 0x4008_af00;
const VHOST_SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const VHOST_SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const VHOST_SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const VHOST_SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const VHOST_SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const VHOST_SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const VHOST_NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// What of a driver's choice concerns the one who serves the queues. Checksums and segments are the tap's business.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// `struct vhost_vring_state` and `struct vhost_vring_file`: the queue, and a number or a descriptor.
#[repr(C)]
struct Setting<T> {
    queue: u32,
    value: T,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Rings {
    queue: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest: u64,
    size: u64,
    here: u64,
    flags: u64,
}

/// More than the ranges that a machine's memory has.
const MOST_REGIONS: usize = 8;

/// `struct vhost_memory` with room.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [Region; MOST_REGIONS],
}

/// The kernel's side of a pair of a NIC's queues. Dropped, it serves none.
pub struct Vhost {
    fd: OwnedFd,
    /// How many queues it serves now.
    serves: u32,
}

impl Vhost {
    /// Takes a fresh /dev/vhost-net over for this process.
    ///
    /// # Errors
    /// When it is something else, or too old for the features that NICs have.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let vhost = Self { fd, serves: 0 };
        let mut features = 0_u64;
        // SAFETY: the call takes nothing.
        unsafe { vhost.call(VHOST_SET_OWNER, std::ptr::null::<u64>()) }?;
        // SAFETY: the call writes eight bytes.
        unsafe { vhost.call(VHOST_GET_FEATURES, &raw mut features) }?;
        if features & FEATURES == FEATURES { Ok(vhost) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    /// # Safety
    /// The argument must be what the request reads or writes.
    unsafe fn call<T>(&self, request: libc::c_ulong, argument: *const T) -> io::Result<()> {
        // SAFETY: as the caller promises.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn set<T>(&self, request: libc::c_ulong, queue: u32, value: T) -> io::Result<()> {
        let setting = Setting { queue, value };
        // SAFETY: this is for the requests that read such a structure.
        unsafe { self.call(request, &raw const setting) }
    }

    /// Serves some of a driver's queues between its memory and a tap.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(
        &mut self,
        tap: BorrowedFd<'_>,
        activation: &Activation,
        queues: &[VirtQueue],
    ) -> io::Result<()> {
        let features = activation.features & FEATURES;
        // SAFETY: the call reads eight bytes.
        unsafe { self.call(VHOST_SET_FEATURES, &raw const features) }?;
        let table = memory_table(&activation.memory)?;
        // SAFETY: the call reads a table of as many regions as its count says.
        unsafe { self.call(VHOST_SET_MEM_TABLE, &raw const table) }?;
        for (number, queue) in (0..).zip(queues) {
            self.set_up(number, queue, &activation.memory)?;
        }
        for number in (0..).take(queues.len()) {
            self.set(VHOST_NET_SET_BACKEND, number, tap.as_raw_fd())?;
            self.serves = number + 1;
        }
        Ok(())
    }

    fn set_up(&self, number: u32, queue: &VirtQueue, memory: &GuestMemory) -> io::Result<()> {
        let VirtQueue { queue, kick, interrupt } = queue;
        let size = usize::from(queue.size());
        // virtio 1.2, 2.7: the sizes of the three parts, with the fields for events.
        let rings = Rings {
            queue: number,
            flags: 0,
            descriptors: address(memory, queue.desc_table(), 16 * size)?,
            used: address(memory, queue.used_ring(), 6 + 8 * size)?,
            available: address(memory, queue.avail_ring(), 6 + 2 * size)?,
            log: 0,
        };
        let event = interrupt.event().ok_or(io::ErrorKind::Unsupported)?;
        self.set(VHOST_SET_VRING_NUM, number, u32::from(queue.size()))?;
        self.set(VHOST_SET_VRING_BASE, number, u32::from(queue.next_avail()))?;
        // SAFETY: the call reads such a structure; the kernel checks the addresses in it as those of this process.
        unsafe { self.call(VHOST_SET_VRING_ADDR, &raw const rings) }?;
        self.set(VHOST_SET_VRING_KICK, number, kick.as_raw_fd())?;
        self.set(VHOST_SET_VRING_CALL, number, event.as_raw_fd())
    }

    /// Serves no queue any more when this returns.
    pub fn stop(&mut self) {
        const NONE: RawFd = -1;
        for number in 0..std::mem::take(&mut self.serves) {
            if let Err(error) = self.set(VHOST_NET_SET_BACKEND, number, NONE) {
                log::error!("vhost-net: stop queue {number}: {error}");
            }
        }
    }
}

/// Where a part of guest memory is in this process, if it lies there in one piece.
fn address(memory: &GuestMemory, at: u64, length: usize) -> io::Result<u64> {
    let slice = memory.get_slice(GuestAddress(at), length).map_err(io::Error::other)?;
    Ok(slice.ptr_guard().as_ptr() as u64)
}

fn memory_table(memory: &GuestMemory) -> io::Result<MemoryTable> {
    let mut table = MemoryTable { count: 0, padding: 0, regions: [Region::default(); MOST_REGIONS] };
    for region in memory.iter() {
        let here = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let entry = table.regions.get_mut(table.count as usize).ok_or(io::ErrorKind::OutOfMemory)?;
        *entry = Region { guest: region.start_addr().0, size: region.len(), here: here as u64, flags: 0 };
        table.count += 1;
    }
    Ok(table)
}
