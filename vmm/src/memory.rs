//! The guest's memory: one type for all of the VMM.

/// Guest memory as every device sees it. The bitmap type is the one that virtiofsd's readers and writers ask
/// for; nothing is tracked with it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vhost_user_backend::bitmap::BitmapMmapRegion>;
