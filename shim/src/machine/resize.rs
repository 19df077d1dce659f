//! The machine grows and shrinks with its containers' limits.

use std::path::Path;
use std::time::Duration;

use super::Machine;
use super::size::Limits;
use crate::error::Result;
use crate::spec::{Source, Spec};
use crate::storage::rootfs::Layer;
use crate::storage::volumes;

/// How long a guest may take to plug memory.
const PLUG_LIMIT: Duration = Duration::from_secs(10);

impl Machine {
    /// A container is about to come that can write to these volumes and layers. Blocks.
    pub fn see_sources(&self, spec: &Spec, sources: &[Source], layers: &[Layer]) {
        let Some(host_limits) = &self.host_limits else { return };
        let upper = layers.iter().flat_map(|layer| &layer.options);
        let upper = upper.filter_map(|option| option.strip_prefix("upperdir=")).map(Path::new);
        let binds = spec.mounts.iter().zip(sources).filter_map(|(mount, source)| match source {
            Source::Host(path) if volumes::access(&mount.options).lets_write() => Some(path.as_path()),
            _ => None,
        });
        host_limits.see(binds.chain(upper));
    }

    /// Grows or shrinks the machine to what these limits need. Does not wait for memory to be given back.
    pub async fn fit(&self, limits: &Limits) -> Result<()> {
        let wanted = self.bounds.size(limits);
        let mut size = self.size.lock().await;
        if let Some(host_limits) = &self.host_limits {
            host_limits.follow(limits, wanted, self.vmm.plugged());
        }
        if size.vcpus != wanted.vcpus {
            if size.vcpus < wanted.vcpus {
                self.vmm.add_vcpus(wanted.vcpus).await?;
            }
            self.agent().await?.set_cpus(wanted.vcpus).await?;
            size.vcpus = wanted.vcpus;
        }
        if size.plugged_mib != wanted.plugged_mib {
            self.vmm.plug_memory(wanted.plugged_mib)?;
            size.plugged_mib = wanted.plugged_mib;
        }
        let mut plugged = self.vmm.plugged();
        let grown = plugged.wait_for(|mib| *mib >= wanted.plugged_mib);
        if tokio::time::timeout(PLUG_LIMIT, grown).await.is_err() {
            // The containers' own limits hold all the same, and there may be enough without.
            log::warn!("the guest does not plug {} MiB of memory", wanted.plugged_mib);
        }
        Ok(())
    }
}
