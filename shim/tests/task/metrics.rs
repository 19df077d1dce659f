//! What the pod's socket tells Prometheus.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::containerd::{Containerd, can_run};
use crate::silent::stop_agent_of;

/// Numbers by their whole series.
type Metrics = BTreeMap<String, f64>;

fn metrics(id: &str) -> Metrics {
    let pods = std::fs::read_dir("/run/kata-containers/sandboxes").unwrap().flatten();
    let is_it = |state: &str| state.contains(&format!("\"sandbox\": \"{id}\""));
    let mut directories = pods.map(|pod| pod.path());
    let directory = directories
        .find(|path| std::fs::read_to_string(path.join("state.json")).is_ok_and(|state| is_it(&state)));
    let mut stream = UnixStream::connect(directory.unwrap().join("shim-monitor.sock")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("text/plain; version=0.0.4"), "{head}");
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.map(|line| line.rsplit_once(' ').unwrap());
    pairs.map(|(series, value)| (series.to_owned(), value.parse().unwrap())).collect()
}

fn value(metrics: &Metrics, series: &str) -> f64 {
    *metrics.get(series).unwrap_or_else(|| panic!("no {series} in {metrics:#?}"))
}

#[tokio::test]
async fn metrics_are_those_of_shim_vmm_and_guest() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("metrics").await;
    containerd.run("exec sleep 1000").await;
    let vmm = containerd.state("").await.unwrap().pid;
    let first = metrics(&containerd.id());
    assert_eq!(value(&first, "kata_shim_guest_up"), 1.0);
    // The stand-in's, which are numbered.
    assert_eq!(value(&first, "kata_hypervisor_exits_total{kind=\"port_write\"}"), 1.0);
    assert_eq!(value(&first, "kata_hypervisor_vsock_bytes_total{direction=\"sent\"}"), 30.0);
    let resident = value(&first, "kata_hypervisor_proc_status{item=\"vmrss\"}");
    let status = std::fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let expected: f64 = line.split_whitespace().next().unwrap().parse().unwrap();
    assert!((resident / 1024.0 - expected).abs() <= expected * 0.05, "{resident} {expected} KiB");
    assert!(value(&first, "kata_shim_pod_overhead_memory_in_bytes") > 1e6);
    for series in [
        "kata_guest_meminfo{item=\"mem_total\"}",
        "kata_guest_cpu_time{cpu=\"total\",item=\"user\"}",
        "kata_agent_process_resident_memory_bytes",
        "kata_agent_process_open_fds",
        "kata_shim_process_open_fds",
        "kata_shim_rpc_durations_histogram_milliseconds_count{action=\"create\"}",
        "kata_shim_agent_rpc_durations_histogram_milliseconds_count{action=\"grpc.CreateContainerRequest\"}",
        "kata_shim_machine_starts_total{from=\"boot\"}",
    ] {
        assert!(value(&first, series) > 0.0, "{series}");
    }
    let stages = first.keys().filter(|series| series.starts_with("kata_shim_start_duration_seconds_count"));
    assert_eq!(stages.count(), 7, "{first:#?}");

    let agent = stop_agent_of(vmm).await;
    let begun = Instant::now();
    let second = metrics(&containerd.id());
    let took = begun.elapsed();
    kill(agent, Signal::SIGCONT).unwrap();
    assert_eq!((value(&second, "kata_shim_guest_up"), value(&second, "kata_agent_scrape_count")), (0.0, 2.0));
    assert!(second.keys().all(|series| !series.starts_with("kata_guest")), "{second:#?}");
    assert!(took >= Duration::from_millis(700) && took < Duration::from_secs(2), "{took:?}");
    let third = metrics(&containerd.id());
    assert_eq!(value(&third, "kata_shim_guest_up"), 1.0);
    containerd.end().await;
    containerd.shut_down().await;
}
