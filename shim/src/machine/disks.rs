//! Disks of the host in the slots of the machine.

use std::sync::Arc;

use katana_protocol::agent as api;

use super::Machine;
use crate::error::{Error, Result};
use crate::spec::OnDisks;
use crate::storage::disks::{DiskSlot, Lasting, Purpose, Wanted};
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
        if self.becomes_template && !wanted.is_empty() {
            self.agent().await?;
        }
        for wanted in wanted {
            let (path, is_needed) = (wanted.path.clone(), wanted.is_needed());
            let opened = crate::host::threads::blocking(move || wanted.open()).await;
            let disk = match opened {
                Err(e) if !is_needed => {
                    log::warn!("{e}: it is shared instead of being a disk");
                    continue;
                }
                opened => opened?,
            };
            let mut slots = self.disks.lock().await;
            let Some(DiskSlot { slot, shared }) = slots.take(container, &disk, is_needed) else {
                if !is_needed {
                    log::info!("{} is not made a disk: all disk slots are in use", path.display());
                    crate::host::threads::blocking(move || {
                        disk.discard();
                        Ok(())
                    })
                    .await?;
                    continue;
                }
                return Err(Error::FailedPrecondition(format!(
                    "disk {}: all {} disk slots of the pod's VM are in use (disk_slots in the configuration)",
                    path.display(),
                    slots.count()
                )));
            };
            let message = disk.message(slot, container);
            match disk.purpose() {
                Purpose::Root { .. } => on_disks.root = true,
                Purpose::Writable(writable) => {
                    on_disks.root = true;
                    below = Some(writable.below().clone());
                }
                Purpose::Device(mount) => {
                    on_disks.mounts.extend(mount.map(|number| (number, slot)));
                    on_disks.devices.push((message.major.into(), message.minor.into()));
                }
            }
            disks.push(message);
            if !shared {
                self.vmm.attach_disk(slot, disk.read_only(), disk.into_file()).await?;
            }
        }
        Ok(Attached { disks, on_disks, below })
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
