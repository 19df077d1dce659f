//! What is in the pod, and what it uses.

use std::time::Duration;

use futures::future::join_all;
use katana_protocol::manage::{self, ContainerStats, Stats, Status};

use crate::pod::Pod;
use crate::pod::container::Container;
use crate::pod::process::Phase;
use crate::pod::stats::metrics;

/// How long the guest may take to say what its containers use.
const LIMIT: Duration = Duration::from_secs(1);

/// Annotations of containerd's CRI plugin and of CRI-O.
const IMAGE: [&str; 2] = ["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"];
const NAME: [&str; 2] = ["io.kubernetes.cri.container-name", "io.kubernetes.cri-o.ContainerName"];
const POD_NAME: [&str; 2] = ["io.kubernetes.cri.sandbox-name", "io.kubernetes.cri-o.KubeName"];
const POD_NAMESPACE: [&str; 2] = ["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri-o.Namespace"];

/// The pod and its containers. Asks nobody.
pub fn pod(pod: &Pod) -> manage::Pod {
    let all = pod.all();
    let kubernetes = all.iter().find_map(|container| {
        let of = |names| container.spec.annotation(names).map(str::to_owned);
        of(&POD_NAMESPACE).zip(of(&POD_NAME))
    });
    let (id, namespace) = (pod.id().to_owned(), pod.namespace().to_owned());
    manage::Pod {
        id,
        namespace,
        kubernetes,
        containers: all.iter().map(|container| describe(container)).collect(),
    }
}

fn describe(container: &Container) -> manage::Container {
    let annotation = |names| container.spec.annotation(names).map(str::to_owned);
    let phase = container.init.phase();
    manage::Container {
        id: container.id.clone(),
        name: annotation(&NAME),
        image: annotation(&IMAGE),
        sandbox: container.spec.is_sandbox(),
        status: match phase {
            Phase::Created => Status::Created,
            Phase::Running if container.is_paused() => Status::Paused,
            Phase::Running => Status::Running,
            Phase::Stopped(_) => Status::Stopped,
        },
        pid: container.pid,
        exit_status: container.init.exit().map(|exit| exit.status),
    }
}

/// What the running containers use. Those of a guest that does not answer are left out.
pub async fn stats(pod: &Pod) -> Stats {
    let all = pod.all();
    let asked = all.iter().map(|container| async {
        let files = tokio::time::timeout(LIMIT, container.stats()).await.ok()?.ok()?;
        let metrics = metrics(&files);
        let sum = |of: fn(&_) -> u64| metrics.io.usage.iter().map(of).fold(0, u64::saturating_add);
        Some(ContainerStats {
            id: container.id.clone(),
            cpu_usec: metrics.cpu.usage_usec,
            memory: metrics.memory.usage,
            memory_limit: Some(metrics.memory.usage_limit).filter(|limit| !matches!(*limit, 0 | u64::MAX)),
            pids: metrics.pids.current,
            read: sum(|entry: &containerd_shim_protos::cgroups_v2::metrics::IOEntry| entry.rbytes),
            written: sum(|entry| entry.wbytes),
        })
    });
    Stats { containers: join_all(asked).await.into_iter().flatten().collect() }
}
