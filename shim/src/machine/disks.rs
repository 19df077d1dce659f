//! Disks of the host in the slots of the machine.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use katana_protocol::{GUEST_DISKS, agent as api};

use super::Machine;
use crate::error::{Error, Result};
use crate::spec::OnDisks;
use crate::storage::disk_slots::{DiskSlot, Lasting};
use crate::storage::disks::{Kind, Opened, Purpose, Wanted};
use crate::storage::pod_volumes::Directory;
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
        // But for its root, a container may have what another one has.
        let others = wanted.iter().any(|wanted| wanted.purpose.kind() != Kind::Root);
        let mut shared = if others { Some(self.shared_volumes.lock().await) } else { None };
        for wanted in wanted {
            let attached = self.attach_disk(container, wanted, shared.as_deref_mut()).await?;
            let Some((message, purpose)) = attached else { continue };
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
                Purpose::Volume(volume) => on_disks.mounts.extend(volume.in_guest(message.slot)),
            }
            disks.push(message);
        }
        Ok(Attached { disks, on_disks, below })
    }

    /// Gives a container a disk; `None` if it is shared instead, now and, if it is a volume, later.
    async fn attach_disk(
        &self,
        container: &str,
        wanted: Wanted,
        shared: Option<&mut HashSet<Directory>>,
    ) -> Result<Option<(api::Disk, Purpose)>> {
        let (path, is_needed) = (wanted.path.clone(), wanted.is_needed());
        let directory = wanted.directory();
        let is_shared = directory.zip(shared.as_deref()).is_some_and(|(one, all)| all.contains(&one));
        let disk = if is_needed {
            Ok(crate::host::threads::blocking(move || wanted.open()).await?)
        } else if is_shared {
            Err("a container of the pod shares it".to_owned())
        } else {
            self.open_if_it_may_be(wanted).await
        };
        let disk = match disk {
            Ok(disk) => disk,
            Err(why) => {
                log::info!("{}: it is shared instead of being a disk: {why}", path.display());
                if let (Some(shared), Some(directory)) = (shared, directory) {
                    shared.insert(directory);
                }
                return Ok(None);
            }
        };
        self.release_stuck(&disk).await?;
        let mut slots = self.disks.lock().await;
        if !slots.have(&disk) {
            disk.lock()?;
        }
        let taken = slots.take(container, &disk).ok_or_else(|| {
            let (path, count) = (path.display(), slots.count());
            Error::FailedPrecondition(format!(
                "disk {path}: all {count} disk slots of the pod's VM are in use (disk_slots in the configuration)"
            ))
        });
        drop(slots);
        let DiskSlot { slot, shared } = taken?;
        let (message, purpose) = (disk.message(slot, container), disk.purpose().clone());
        if !shared {
            self.vmm.attach_disk(slot, disk.read_only(), disk.into_file()).await?;
        }
        Ok(Some((message, purpose)))
    }

    /// Opens a disk that can be shared as well, or says why it is to be.
    async fn open_if_it_may_be(&self, wanted: Wanted) -> std::result::Result<Opened, String> {
        let slots = self.disks.lock().await;
        let (has_room, most) = (slots.have_room(wanted.purpose.kind()), slots.limits().empty_dirs);
        drop(slots);
        if !has_room {
            return Err("the disk slots for such disks are in use".into());
        }
        let policy = self.disk_policy;
        let opened = crate::host::threads::blocking(move || match &wanted.purpose {
            Purpose::Volume(volume) if !volume.may_be_disk(policy, most) => Err(Error::FailedPrecondition(
                "there are files in it, a mount of it is not private, or there are many such disks".into(),
            )),
            _ => wanted.open(),
        });
        opened.await.map_err(|e| e.to_string())
    }

    /// Tries again to take away a disk that an earlier container had.
    async fn release_stuck(&self, disk: &Opened) -> Result<()> {
        let stuck = self.disks.lock().await.stuck(disk);
        if let Some((slot, volatile)) = stuck {
            self.release_disk(slot, volatile).await?;
            self.disks.lock().await.free(slot);
        }
        Ok(())
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
            // The next container may want the same, and gets it when it is free.
            let lasting = machine.has_disks(&container).await == Some(Lasting(true));
            let _others = if lasting { Some(machine.shared_volumes.lock().await) } else { None };
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
