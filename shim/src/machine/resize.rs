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
        host_limits.see(writable(spec, sources, layers));
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

/// The directories and files of the host that a container can write to: volumes, and what is on top of its root.
fn writable<'a>(
    spec: &'a Spec,
    sources: &'a [Source],
    layers: &'a [Layer],
) -> impl Iterator<Item = &'a Path> {
    let upper = layers.iter().flat_map(|layer| &layer.options);
    let upper = upper.filter_map(|option| option.strip_prefix("upperdir=")).map(Path::new);
    let roots = layers.iter().filter_map(Layer::bound).filter(|(_, writable)| *writable);
    let volumes = spec.mounts.iter().zip(sources).filter_map(|(mount, source)| match source {
        Source::Host(path) if volumes::access(&mount.options).lets_write() => Some(path.as_path()),
        _ => None,
    });
    volumes.chain(upper).chain(roots.map(|(source, _)| source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_container_can_write_to() {
        let mounts = json!([{"destination": "/a", "type": "bind", "source": "/volume", "options": ["rbind"]},
            {"destination": "/b", "type": "bind", "source": "/config", "options": ["rbind", "ro"]}]);
        let spec: Spec = serde_json::from_value(json!({"mounts": mounts})).unwrap();
        let sources = [Source::Host("/volume".into()), Source::Host("/config".into())];
        let layer = |kind: &str, source: &str, options: &[&str]| Layer {
            kind: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        };
        let of = |layer| -> Vec<_> {
            let layers = [layer];
            writable(&spec, &sources, &layers).map(Path::to_owned).collect()
        };
        let overlay = layer("overlay", "overlay", &["upperdir=/upper", "workdir=/work", "lowerdir=/lower"]);
        assert_eq!(of(overlay), [Path::new("/volume"), Path::new("/upper")]);
        // The native snapshotter's.
        let native = layer("bind", "/dev/shm", &["rbind", "rw"]);
        assert_eq!(of(native), [Path::new("/volume"), Path::new("/dev/shm")]);
        let disk = layer("ext4", "/dev/vda", &["rw"]);
        for other in [layer("bind", "/dev/shm", &["rbind", "ro"]), disk] {
            assert_eq!(of(other), [Path::new("/volume")]);
        }
    }
}
