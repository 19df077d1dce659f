//! Disks of the host in the slots of the machine.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use katana_protocol::{GUEST_DISKS, agent as api};

use super::Machine;
use crate::error::{Error, Result};
use crate::spec::OnDisks;
use crate::storage::disk_slots::DiskSlot;
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
        // The host may take long to open a device: nobody else waits for that.
        let mut all = Vec::new();
        for wanted in wanted {
            let opened = if wanted.purpose.kind() == Kind::Device {
                let (again, is_needed) = (wanted.clone(), wanted.is_needed());
                match crate::host::threads::blocking(move || again.open()).await {
                    Err(e) if !is_needed => {
                        log::info!("{}: it is shared instead of being a disk: {e}", wanted.path.display());
                        continue;
                    }
                    opened => Some(opened?),
                }
            } else {
                None
            };
            all.push((wanted, opened));
        }
        // But for its root, a container may have what another one has.
        let others = all.iter().any(|(wanted, _)| wanted.purpose.kind() != Kind::Root);
        let mut shared_volumes = if others { Some(self.shared_volumes.lock().await) } else { None };
        // What can be shared as well takes no slot of what cannot.
        let is_needed = |(wanted, opened): (Wanted, _)| (wanted.is_needed(), wanted, opened);
        let mut all: Vec<_> = all.into_iter().map(is_needed).collect();
        all.sort_by_key(|(is_needed, ..)| !is_needed);
        for (is_needed, wanted, opened) in all {
            let attached =
                self.attach_disk(container, wanted, is_needed, opened, shared_volumes.as_deref_mut()).await?;
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
        is_needed: bool,
        opened: Option<Opened>,
        shared_volumes: Option<&mut HashSet<Directory>>,
    ) -> Result<Option<(api::Disk, Purpose)>> {
        let (path, directory) = (wanted.path.clone(), wanted.directory());
        let is_shared = directory.zip(shared_volumes.as_deref()).is_some_and(|(one, all)| all.contains(&one));
        let taken = match opened {
            Some(disk) => self.take_slot(container, disk, is_needed).await?,
            None if is_needed => {
                let disk = crate::host::threads::blocking(move || wanted.open()).await?;
                self.take_slot(container, disk, true).await?
            }
            None if is_shared => Err("a container of the pod shares it".to_owned()),
            None => match self.open_if_it_may_be(wanted).await {
                Ok(disk) => self.take_slot(container, disk, false).await?,
                Err(why) => Err(why),
            },
        };
        match taken {
            Ok(attached) => Ok(Some(attached)),
            Err(why) => {
                log::info!("{}: it is shared instead of being a disk: {why}", path.display());
                if let (Some(volumes), Some(directory)) = (shared_volumes, directory) {
                    volumes.insert(directory);
                }
                Ok(None)
            }
        }
    }

    /// Puts a disk into a slot, or says why it is to be shared.
    async fn take_slot(
        &self,
        container: &str,
        disk: Opened,
        is_needed: bool,
    ) -> Result<std::result::Result<(api::Disk, Purpose), String>> {
        let mut slots = self.disks.lock().await;
        if !slots.have(&disk) {
            disk.lock()?;
        }
        let mut taken = slots.take(container, &disk);
        if taken.is_none() {
            drop(slots);
            self.release_busy().await;
            slots = self.disks.lock().await;
            taken = slots.take(container, &disk);
        }
        let count = slots.count();
        drop(slots);
        let Some(DiskSlot { slot, shared }) = taken else {
            if is_needed {
                return Err(Error::FailedPrecondition(format!(
                    "disk {}: all {count} disk slots of the pod's VM are in use (disk_slots in the configuration)",
                    disk.path().display()
                )));
            }
            crate::host::threads::blocking(move || {
                disk.discard();
                Ok(())
            })
            .await?;
            return Ok(Err("all disk slots are in use".to_owned()));
        };
        let (message, purpose) = (disk.message(slot, container), disk.purpose().clone());
        if !shared && let Err(e) = self.vmm.attach_disk(slot, disk.read_only(), disk.into_file()).await {
            if self.disks.lock().await.give_back(container, slot) && self.vmm.detach_disk(slot).await.is_ok()
            {
                self.disks.lock().await.free(slot);
            }
            return Err(e);
        }
        Ok(Ok((message, purpose)))
    }

    /// Opens a disk that can be shared as well, or says why it is to be.
    async fn open_if_it_may_be(&self, wanted: Wanted) -> std::result::Result<Opened, String> {
        let kind = wanted.purpose.kind();
        if !self.disks.lock().await.have_room(kind) {
            self.release_busy().await;
        }
        let slots = self.disks.lock().await;
        let (has_room, most) = (slots.have_room(kind), slots.limits().empty_dirs);
        drop(slots);
        if !has_room {
            return Err("the disk slots for such disks are in use".into());
        }
        let policy = self.disk_policy;
        let opened = crate::host::threads::blocking(move || match &wanted.purpose {
            Purpose::Volume(volume) if !volume.may_be_disk(policy, most) => Ok(None),
            _ => wanted.open().map(Some),
        });
        let why = "something is in it already, a mount of it is not private, or there are many such disks";
        opened.await.map_err(|e| e.to_string())?.ok_or_else(|| why.to_owned())
    }

    /// Tries again to take away disks that the guest has not released.
    async fn release_busy(&self) {
        let busy = self.disks.lock().await.leave_busy();
        for (slot, volatile) in busy {
            self.release_slot(slot, volatile).await;
        }
    }

    /// Whether a container has disks that outlive it: what it wrote to them is on them after
    /// [`Machine::release_disks`].
    pub async fn has_lasting_disks(&self, container: &str) -> bool {
        self.disks.lock().await.any_lasts(container)
    }

    /// A container is gone from the guest, and its disks with it. On a task of its own.
    pub async fn release_disks(self: &Arc<Self>, container: &str) {
        let (machine, container) = (Arc::clone(self), container.to_owned());
        let released = tokio::spawn(async move {
            // The next container may want the same, and gets it when it is free.
            let _others = if machine.has_lasting_disks(&container).await {
                Some(machine.shared_volumes.lock().await)
            } else {
                None
            };
            let unused = machine.disks.lock().await.leave(&container);
            for (slot, volatile) in unused {
                machine.release_slot(slot, volatile).await;
            }
        });
        let _ = released.await;
    }

    /// Frees a slot, unless the guest or the VMM has its disk still: nobody else gets it then.
    async fn release_slot(&self, slot: u8, volatile: bool) {
        if !self.is_dead() {
            let released = match self.agent().await {
                Ok(agent) => agent.release_disk(slot, volatile).await,
                Err(e) => Err(e),
            };
            if let Err(e) = released {
                log::error!("disk slot {slot}: {e}");
                return self.disks.lock().await.is_busy(slot);
            }
            if let Err(e) = self.vmm.detach_disk(slot).await {
                return log::error!("disk slot {slot}: {e}");
            }
        }
        self.disks.lock().await.free(slot);
    }
}
