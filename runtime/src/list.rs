//! `kata-runtime list` (`ps`): the pods of this host.

use std::fs;
use std::io::{self, Write};
use std::time::Duration;

use katana_pods::Pod;
use katana_pods::memory::Memory;
use katana_protocol::manage;
use serde::Serialize;

use crate::table;

/// Why pods cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime list: {0}")]
    Pods(#[from] katana_pods::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// A pod, as `--json` shows it.
#[derive(Serialize)]
struct Row {
    id: String,
    namespace: String,
    /// Of Kubernetes.
    pod_namespace: Option<String>,
    pod_name: Option<String>,
    age_seconds: u64,
    shim_pid: i32,
    vmm_pid: Option<i32>,
    memory_kib: MemoryKib,
    containers: Vec<manage::Container>,
    /// Why the shim does not say more.
    error: Option<String>,
}

#[derive(Serialize)]
struct MemoryKib {
    shim: u64,
    vmm: u64,
    guest: u64,
}

/// Lists them, as a table or as JSON; `long` shows whole ids.
pub fn run(json: bool, long: bool, out: &mut dyn Write) -> Result<(), Error> {
    let pods = katana_pods::all()?;
    let uptime = uptime();
    let rows: Vec<Row> = crate::block_on(async {
        let described = pods.iter().map(|pod| async { row(pod, pod.get("/pod").await, uptime) });
        futures::future::join_all(described).await
    })?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &rows).map_err(io::Error::from)?;
        writeln!(out)?;
        return Ok(());
    }
    let head = ["POD", "NAMESPACE", "NAME", "CONTAINERS", "IMAGE", "AGE", "SHIM", "VMM", "GUEST"];
    let cells: Vec<_> = rows.iter().map(|row| row.cells(long)).collect();
    table::write(out, head, &cells)?;
    for row in &rows {
        if let Some(error) = &row.error {
            eprintln!("kata-runtime list: {}", table::plain(error));
        }
    }
    Ok(())
}

fn row(pod: &Pod, answer: Result<manage::Pod, katana_pods::Error>, uptime: Duration) -> Row {
    let (described, error) = match answer {
        Ok(described) => (Some(described), None),
        Err(e) => (None, Some(e.to_string())),
    };
    let (kubernetes, containers) = described.map(|pod| (pod.kubernetes, pod.containers)).unwrap_or_default();
    let (pod_namespace, pod_name) = kubernetes.unzip();
    let Memory { shim, vmm, guest } = Memory::of(pod);
    Row {
        id: pod.id.clone(),
        namespace: pod.namespace.clone(),
        pod_namespace,
        pod_name,
        age_seconds: pod.shim.age(uptime).as_secs(),
        shim_pid: pod.shim.pid,
        vmm_pid: pod.vmm.map(|vmm| vmm.pid),
        memory_kib: MemoryKib { shim, vmm, guest },
        containers,
        error,
    }
}

impl Row {
    fn cells(&self, long: bool) -> [String; 9] {
        let id: String = self.id.chars().take(if long { usize::MAX } else { 13 }).collect();
        let name = self.pod_namespace.iter().zip(&self.pod_name).next();
        let name = name.map_or_else(|| "-".into(), |(namespace, name)| format!("{namespace}/{name}"));
        let containers: Vec<_> = self.containers.iter().filter(|container| !container.sandbox).collect();
        let running = containers.iter().filter(|one| one.status == manage::Status::Running).count();
        let counted = match &self.error {
            Some(_) => "?".into(),
            None => format!("{running}/{}", containers.len()),
        };
        let mut images: Vec<_> = containers.iter().filter_map(|one| one.image.as_deref()).collect();
        images.dedup();
        let images = if images.is_empty() { "-".to_owned() } else { images.join(",") };
        let kib = |kib: u64| table::bytes(kib << 10);
        let MemoryKib { shim, vmm, guest } = self.memory_kib;
        let texts = [id, self.namespace.clone(), name, counted, images, table::duration(self.age_seconds)];
        let [id, namespace, name, counted, images, age] = texts.map(|text| table::plain(&text));
        [id, namespace, name, counted, images, age, kib(shim), kib(vmm), kib(guest)]
    }
}

/// How long this host runs: proc_uptime(5), the clock of processes' starts.
fn uptime() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().and_then(|word| word.parse().ok());
    Duration::try_from_secs_f64(seconds.unwrap_or(0.0)).unwrap_or_default()
}
