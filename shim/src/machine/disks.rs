//! Disks of the host in the slots of the machine.

use std::path::Path;
use std::sync::Arc;

use katana_protocol::{GUEST_DISKS, agent as api};

use super::Machine;
use crate::error::{Error, Result};
use crate::spec::OnDisks;
use crate::storage::disk_slots::{DiskSlot, Lasting};
use crate::storage::disks::{Purpose, Wanted};
use crate::storage::rootfs::Layer;

/// A container's disks.
#[derive(Debug, Default)]
pub struct Attached {
    /// For the agent.
    pub disks: Vec<api::Disk>,
    /// For the specification.
    pub on_disks: OnDisks,
    /// What is shared of a root whose writable layer is on one.
    pub below: Option<Layer>,
}

impl Machine {
    /// Gives a container its disks.
    ///
    /// On a task of its own: it must not stop halfway when containerd drops its request.
    pub async fn attach_disks(self: &Arc<Self>, container: &str, wanted: Vec<Wanted>) -> Result<Attached> {
        let (machine, container) = (Arc::clone(self), container.to_owned());
        let attached = tokio::spawn(async move { machine.try_attach_disks(&container, wanted).await });
        attached.await.map_err(|e| Error::Host(format!("disks: {e}")))?
    }

    async fn try_attach_disks(&self, container: &str, wanted: Vec<Wanted>) -> Result<Attached> {
        let Attached { mut disks, mut on_disks, mut below } = Attached::default();
        // Two containers must not both find a directory without an image.
        let _attaching = self.attaching.lock().await;
        if self.becomes_template && !wanted.is_empty() {
            self.agent().await?;
        }
        for wanted in wanted {
            let Some((message, purpose)) = self.attach_disk(container, wanted).await? else { continue };
            match purpose {
                Purpose::Root { .. } => on_disks.root = true,
                Purpose::Writable(writable) => {
                    on_disks.root = true;
                    below = Some(writable.below().clone());
                }
                Purpose::Device(mount) => {
                    let node = Path::new(GUEST_DISKS).join(message.slot.to_string());
                    on_disks.mounts.extend(mount.map(|number| (number, node)));
                    on_disks.devices.push((message.major.into(), message.minor.into()));
                }
                Purpose::Volume(volume, number) => {
                    on_disks.mounts.insert(number, volume.in_guest(message.slot));
                }
            }
            disks.push(message);
        }
        Ok(Attached { disks, on_disks, below })
    }

    /// Gives a container a disk; `None` if it is shared instead.
    async fn attach_disk(&self, container: &str, wanted: Wanted) -> Result<Option<(api::Disk, Purpose)>> {
        let (is_needed, again) = (wanted.is_needed(), wanted.clone());
        let disk = match crate::host::threads::blocking(move || wanted.open()).await {
            Err(e) if !is_needed => return share(again, &e.to_string()).await,
            opened => opened?,
        };
        let mut slots = self.disks.lock().await;
        if !slots.have(&disk) {
            disk.lock()?;
        }
        let Some(DiskSlot { slot, shared }) = slots.take(container, &disk, is_needed) else {
            if !is_needed {
                return share(again, "all disk slots are in use").await;
            }
            return Err(Error::FailedPrecondition(format!(
                "disk {}: all {} disk slots of the pod's VM are in use (disk_slots in the configuration)",
                again.path.display(),
                slots.count()
            )));
        };
        let (message, purpose) = (disk.message(slot, container), disk.purpose().clone());
        if !shared {
            self.vmm.attach_disk(slot, disk.read_only(), disk.into_file()).await?;
        }
        Ok(Some((message, purpose)))
    }

    /// Whether a container has disks, and whether they outlive it: what it wrote to them is on them after
    /// [`Machine::release_disks`] then.
    pub async fn has_disks(&self, container: &str) -> Option<Lasting> {
        self.disks.lock().await.has(container)
    }

    /// A container is gone from the guest, and its disks with it. On a task of its own.
    pub async fn release_disks(self: &Arc<Self>, container: &str) {
        let (machine, container) = (Arc::clone(self), container.to_owned());
        let released = tokio::spawn(async move {
            let unused = machine.disks.lock().await.leave(&container);
            // The next container may want the same.
            let lasting = unused.iter().any(|(_, volatile)| !volatile);
            let _attaching = if lasting { Some(machine.attaching.lock().await) } else { None };
            for (slot, volatile) in unused {
                match machine.release_disk(slot, volatile).await {
                    Ok(()) => machine.disks.lock().await.free(slot),
                    // The guest may still write to it: nobody else gets the slot.
                    Err(e) => log::error!("disk slot {slot}: {e}"),
                }
            }
        });
        let _ = released.await;
    }

    async fn release_disk(&self, slot: u8, volatile: bool) -> Result<()> {
        if self.is_dead() {
            return Ok(());
        }
        self.agent().await?.release_disk(slot, volatile).await?;
        self.vmm.detach_disk(slot).await
    }
}

/// A disk that is shared instead.
async fn share<T: Send + 'static>(wanted: Wanted, why: &str) -> Result<Option<T>> {
    log::info!("{}: {why}: it is shared instead of being a disk", wanted.path.display());
    crate::host::threads::blocking(move || {
        wanted.share();
        Ok(None)
    })
    .await
}
