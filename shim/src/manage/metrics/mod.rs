//! `GET /metrics`: the pod in numbers, with Kata Containers' names where it has some. docs/metrics.md lists them.
//!
//! Nothing is kept but how long requests took: all else is read when somebody asks.

mod counts;
mod guest;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use katana_metrics::process::{self, Files, Whose, booted};
use katana_metrics::text::{Kind, Text};
use katana_protocol::agent::GuestStatsResponse;
use katana_protocol::counters::Counter;

use crate::host::durations::{self, Of};
use crate::machine::Machine;
use crate::pod::Pod;

/// How long the guest may take. Who asks for the metrics of many pods does not wait for one that hangs.
const GUEST_LIMIT: Duration = Duration::from_millis(700);
/// How long the VMM may take.
const VMM_LIMIT: Duration = Duration::from_millis(300);

/// How often somebody has asked, and what the pod had used the last time.
static ASKED: Mutex<Asked> = Mutex::new(Asked { times: 0, used: None });

struct Asked {
    times: u64,
    used: Option<Used>,
}

/// Processor time in seconds, at a time.
#[derive(Debug, Clone, Copy)]
struct Used {
    at: Instant,
    host: f64,
    containers: f64,
}

/// What is known of the pod at a moment.
#[derive(Default)]
struct Seen {
    shim: Files,
    vmm: Option<Vmm>,
    counts: Option<Vec<(Counter, u64)>>,
    guest: Option<GuestStatsResponse>,
    /// Where the machine began.
    start: Option<&'static str>,
    /// When the host booted, in seconds since 1970.
    booted: Option<f64>,
    asked: u64,
    /// In percent of a CPU, since the last time or the shim's start.
    overhead_cpu: Option<f64>,
}

/// The VMM's process.
#[derive(Default)]
struct Vmm {
    files: Files,
    net: String,
}

/// The text.
pub async fn text(pod: &Pod) -> String {
    let machine = pod.launched().borrow().clone();
    let mut seen = see(machine.as_ref()).await;
    let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    asked.times += 1;
    seen.asked = asked.times;
    if let Some(used) = seen.used() {
        let before = asked.used.replace(used);
        seen.overhead_cpu = seen.overhead_cpu(used, before);
    }
    drop(asked);
    seen.text()
}

async fn see(machine: Option<&Arc<Machine>>) -> Seen {
    let shim = Files::of(Path::new("/proc/self"));
    let booted = booted();
    let Some(machine) = machine else { return Seen { shim, booted, ..Seen::default() } };
    let guest = async { machine.agent_now()?.guest_stats(GUEST_LIMIT).await.ok() };
    let (guest, counts) = tokio::join!(guest, machine.counts(VMM_LIMIT));
    // After it has been waited for: the pid is another's when the VMM is gone.
    let vmm = (!machine.is_dead() && machine.pid() != 0).then(|| {
        let process = PathBuf::from(format!("/proc/{}", machine.pid()));
        let net = std::fs::read_to_string(process.join("net/dev")).unwrap_or_default();
        Vmm { files: Files::of(&process), net }
    });
    let start = Some(machine.start());
    Seen { shim, vmm, counts, guest, start, booted, ..Seen::default() }
}

impl Seen {
    fn used(&self) -> Option<Used> {
        let host = self.shim.cpu_seconds()? + self.vmm.as_ref()?.files.cpu_seconds()?;
        let containers = self.guest.as_ref()?.containers_cpu_us as f64 / 1e6;
        Some(Used { at: Instant::now(), host, containers })
    }

    fn overhead_cpu(&self, now: Used, before: Option<Used>) -> Option<f64> {
        let (host, containers, time) = match before {
            Some(before) => {
                let time = now.at.saturating_duration_since(before.at).as_secs_f64();
                (now.host - before.host, now.containers - before.containers, time)
            }
            None => (now.host, now.containers, self.shim.age()?),
        };
        // A guest can claim anything; what its containers use is part of what the VMM does.
        (time > 0.0).then(|| (host - containers).max(0.0) / time * 100.0)
    }

    fn overhead_memory(&self) -> Option<u64> {
        let host = self.shim.resident()?.saturating_add(self.vmm.as_ref()?.files.resident()?);
        Some(host.saturating_sub(self.guest.as_ref()?.containers_memory_bytes))
    }

    fn text(&self) -> String {
        let mut text = Text::default();
        process::write(&mut text, Whose::Shim, &self.shim);
        process::write_usual(&mut text, Whose::Shim, &self.shim, self.booted);
        self.write_pod(&mut text);
        write_durations(&mut text);
        if let Some(vmm) = &self.vmm {
            process::write(&mut text, Whose::Hypervisor, &vmm.files);
            let help = "Interfaces of the pod's network namespace on the host.";
            guest::net_devices(&mut text.family("kata_hypervisor_netdev", Kind::Gauge, help), &vmm.net);
        }
        if let Some(counts) = &self.counts {
            counts::write(&mut text, counts);
        }
        if let Some(guest) = &self.guest {
            guest::write(&mut text, &guest.files, guest.open_descriptors);
        }
        let help = "How often this pod's metrics were asked for.";
        text.family("kata_agent_scrape_count", Kind::Counter, help).add(&[], self.asked);
        text.finish()
    }

    fn write_pod(&self, text: &mut Text) {
        let mut gauge = |name, help, value: Option<f64>| {
            text.family(name, Kind::Gauge, help).add_known(&[], value);
        };
        let help = "Whether the guest has answered; without it, there is nothing of the guest and its agent.";
        gauge("kata_shim_guest_up", help, Some(f64::from(u8::from(self.guest.is_some()))));
        let help = "What shim and VMM use beside the containers, in percent of a CPU, since the last time.";
        gauge("kata_shim_pod_overhead_cpu", help, self.overhead_cpu);
        let help = "What shim and VMM have of memory beside the containers, bytes.";
        let memory = self.overhead_memory().map(|bytes| bytes as f64);
        gauge("kata_shim_pod_overhead_memory_in_bytes", help, memory);
        let help = "Starts of the pod's machine, by where it began.";
        let mut starts = text.family("kata_shim_machine_starts_total", Kind::Counter, help);
        if let Some(start) = self.start {
            starts.add(&[("from", start)], 1);
        }
    }
}

fn write_durations(text: &mut Text) {
    let families = [
        (Of::Requests, "rpc", "How long requests of containerd took."),
        (Of::Agent, "agent_rpc", "How long requests to the agent took."),
    ];
    for (of, name, help) in families {
        let name = format!("kata_shim_{name}_durations_histogram_milliseconds");
        let mut family = text.family(&name, Kind::Histogram, help);
        for (action, histogram) in durations::of(of) {
            // As Kata Containers' shim calls requests to its agent.
            let action = if of == Of::Agent { format!("grpc.{action}Request") } else { action.to_owned() };
            family.add_histogram(&[("action", &action)], &histogram);
        }
    }
    let help = "How long after the request for the pod its start had come so far.";
    let mut family = text.family("kata_shim_start_duration_seconds", Kind::Histogram, help);
    for (stage, histogram) in durations::of(Of::Start) {
        family.add_histogram_in_seconds(&[("stage", stage)], &histogram);
    }
}

#[cfg(test)]
mod tests;
