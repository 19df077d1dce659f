//! Metrics: they agree with what the host and the guest say, Prometheus' own tool reads them, and who hangs holds nobody up.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use katana_tests::command::Running;
use katana_tests::cri::Pod;
use katana_tests::host::eventually;
use katana_tests::process::Process;
use katana_tests::turn::{Turn, alone, shared};
use katana_tests::{BUSYBOX, Command, Configuration, Run, Scratch, environment};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::tool::program;

/// What promtool has to say about names of Kata Containers', which are as they are: it begins each line with one.
const KATAS_NAMES: [&str; 6] = [
    "kata_agent_scrape_count ",
    "kata_shim_agent_rpc_durations_histogram_milliseconds ",
    "kata_shim_rpc_durations_histogram_milliseconds ",
    "kata_monitor_scrape_count ",
    "kata_monitor_scrape_failed_count ",
    "kata_monitor_scrape_durations_histogram_milliseconds ",
];
/// And about a number of Kata Containers' that it takes for a counter's by its name.
const RUNNING_SHIMS: &str = "kata_monitor_running_shim_count ";

/// Numbers by their whole series.
type Metrics = BTreeMap<String, f64>;

fn parse(text: &str) -> Metrics {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.map(|line| line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}")));
    pairs.map(|(series, value)| (series.to_owned(), value.parse().expect("a number"))).collect()
}

fn metrics_of(id: &str) -> Metrics {
    parse(&program("kata-runtime", &["metrics", id]).output().ok().text())
}

#[track_caller]
fn value(metrics: &Metrics, series: &str) -> f64 {
    *metrics.get(series).unwrap_or_else(|| panic!("no {series} in {metrics:#?}"))
}

/// Within 5 % of what was seen before and after it was told: what runs in between changes it.
#[track_caller]
fn expect_between(what: &str, told: f64, before: f64, after: f64) {
    let (least, most) = (before.min(after) * 0.95, before.max(after) * 1.05);
    assert!((least..=most).contains(&told), "{what}: {told}, before {before}, after {after}");
}

/// What the host and the guest say of a pod's memory.
struct Seen {
    /// Of shim and VMM, bytes: VmRSS, VmSize, VmData.
    processes: [[f64; 3]; 2],
    /// Of the container, bytes.
    container: f64,
}

impl Seen {
    const KEYS: [&str; 3] = ["VmRSS", "VmSize", "VmData"];

    fn now(id: &str, pids: [i32; 2]) -> Self {
        let stats = program("kata-runtime", &["stats", "--json", id]).output().ok().text();
        let stats: Vec<Value> = serde_json::from_str(&stats).expect("JSON");
        let processes = pids.map(|pid| Self::KEYS.map(|key| status(pid, key) * 1024.0));
        Self { processes, container: stats[0]["memory"].as_f64().expect("memory") }
    }

    fn overhead(&self) -> f64 {
        self.processes[0][0] + self.processes[1][0] - self.container
    }
}

/// A number of a process of this host: a line of its status, KiB.
fn status(pid: i32, key: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line =
        text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key}: {text}"));
    line.trim_start_matches(':').split_whitespace().next().expect("a number").parse().expect("a number")
}

fn is_ours(turn: Turn) -> Option<Turn> {
    environment::is_vm_or_say("this is Katana's own program").then_some(turn)
}

/// `kata-monitor`, until it is dropped.
struct Monitor {
    port: u16,
    running: Running,
}

impl Monitor {
    fn start() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("its number").port();
        drop(free);
        let address = format!("127.0.0.1:{port}");
        let running = program("kata-monitor", &["--listen-address", &address]).patiently().spawn();
        assert!(eventually(|| TcpStream::connect(&address).is_ok()), "kata-monitor does not listen");
        Self { port, running }
    }

    /// The answer's head and its body.
    fn get(&self, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("a connection");
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.to_owned(), body.to_owned())
    }

    fn metrics(&self) -> String {
        let (head, body) = self.get("/metrics");
        assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("text/plain; version=0.0.4"), "{head}");
        body
    }
}

/// A machine from a template may have none: the kernel does for it what it asks for.
#[test]
fn exits_of_a_boot_are_counted() {
    let Some(_turn) = is_ours(shared()) else { return };
    let scratch = Scratch::new();
    let text = Configuration::installed().set("factory.enable_template", false).to_toml();
    let path = scratch.file("configuration.toml", text);
    let container = Run::new(BUSYBOX).configuration(&path).command(&["sleep", "10000"]).start();
    let metrics = metrics_of(container.id());
    for kind in ["mmio_read", "mmio_write", "port_write"] {
        assert!(value(&metrics, &format!("kata_hypervisor_exits_total{{kind=\"{kind}\"}}")) > 0.0, "{kind}");
    }
}

#[test]
fn metrics_of_a_pod_agree_with_host_and_guest() {
    let Some(_turn) = is_ours(shared()) else { return };
    let scratch = Scratch::new();
    let size = 3 << 20;
    scratch.file("data", vec![b'x'; size]);
    let script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=20 2>/dev/null; echo ready; exec sleep 10000";
    let container = Run::new(BUSYBOX).bind(scratch.path(), "/volume", "ro").sh(script).start();
    let id = container.id();
    let before = metrics_of(id);
    container.sh("cat /volume/data >/dev/null").ok();
    let pids = [Process::shim_of(id).pid, Process::vmm_of(id).pid];
    let seen = Seen::now(id, pids);
    let after = metrics_of(id);
    let then = Seen::now(id, pids);

    assert_eq!(value(&after, "kata_shim_guest_up"), 1.0);
    for (number, (name, pid)) in ["kata_shim", "kata_hypervisor"].into_iter().zip(pids).enumerate() {
        for (key, item) in ["vmrss", "vmsize", "vmdata"].into_iter().enumerate() {
            let told = value(&after, &format!("{name}_proc_status{{item=\"{item}\"}}"));
            let [seen, then] = [&seen, &then].map(|seen| seen.processes[number][key]);
            expect_between(&format!("{item} of {name}"), told, seen, then);
        }
        // They come and go.
        assert!((value(&after, &format!("{name}_threads")) - status(pid, "Threads")).abs() <= 2.0);
    }
    let total = container.sh("grep MemTotal: /proc/meminfo").ok().text();
    let total: f64 = total.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    let told = value(&after, "kata_guest_meminfo{item=\"mem_total\"}");
    expect_between("MemTotal", told, total * 1024.0, total * 1024.0);
    assert!(value(&after, "kata_guest_cpu_time{cpu=\"total\",item=\"idle\"}") > 0.0);
    assert!(value(&after, "kata_agent_process_resident_memory_bytes") > 1e5);

    let told = value(&after, "kata_shim_pod_overhead_memory_in_bytes");
    expect_between("overhead", told, seen.overhead(), then.overhead());

    let grown = |series: &str| value(&after, series) - value(&before, series);
    assert!(grown("kata_hypervisor_file_bytes_total{direction=\"read\"}") >= size as f64, "{after:#?}");
    assert!(grown("kata_hypervisor_file_requests_total{kind=\"read\"}") > 0.0);
    assert!(grown("kata_hypervisor_vsock_bytes_total{direction=\"sent\"}") > 1000.0);
    assert!(grown("kata_agent_scrape_count") >= 1.0);
    assert_eq!(value(&after, "kata_shim_rpc_durations_histogram_milliseconds_count{action=\"create\"}"), 1.0);
    let stages = after.keys().filter(|series| series.starts_with("kata_shim_start_duration_seconds_count"));
    assert_eq!(stages.count(), 7, "{after:#?}");
    let starts = after.keys().filter(|series| series.starts_with("kata_shim_machine_starts_total{from="));
    assert_eq!(starts.count(), 1);
}

/// promtool knows no other way to be told of names that are as they are.
#[track_caller]
fn expect_promtool_reads(text: &str) {
    let output = Command::new(&["promtool", "check", "metrics"]).input(text).output();
    assert!([0, 3].contains(&output.code), "{output}");
    for line in output.errors().lines().chain(output.text().lines()) {
        let known = KATAS_NAMES.iter().chain([&RUNNING_SHIMS]).any(|name| line.starts_with(name));
        assert!(known, "{line}\n{output}");
    }
}

#[test]
fn metrics_of_all_pods_are_read_by_promtool() {
    let Some(_turn) = is_ours(shared()) else { return };
    let pod = Pod::run("kata");
    let container = pod.sh("echo ready; exec sleep 10000");
    container.wait_for_output("ready");
    let other = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    let monitor = Monitor::start();
    let text = monitor.metrics();
    let metrics = parse(&text);
    let metadata = &pod.config().metadata;
    let (namespace, name) = (&metadata.namespace, &metadata.name);
    let labels = format!("sandbox_id=\"{}\",cri_namespace=\"{namespace}\",cri_name=\"{name}\"", pod.id());
    assert_eq!(value(&metrics, &format!("kata_shim_guest_up{{{labels}}}")), 1.0);
    assert_eq!(value(&metrics, &format!("kata_shim_guest_up{{sandbox_id=\"{}\"}}", other.id())), 1.0);
    assert!(value(&metrics, "kata_monitor_running_shim_count") >= 2.0);
    let (_, ids) = monitor.get("/sandboxes");
    assert!([pod.id(), other.id()].iter().all(|id| ids.lines().any(|line| line == *id)), "{ids}");
    let (_, one) = monitor.get(&format!("/metrics?sandbox={}", pod.id()));
    assert_eq!(value(&parse(&one), "kata_shim_guest_up"), 1.0);
    let (head, _) = monitor.get("/metrics?sandbox=no-such-pod");
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    if std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|p| p.join("promtool").exists()))
    {
        expect_promtool_reads(&text);
        expect_promtool_reads(&one);
    } else {
        environment::say_skipped("there is no promtool");
    }
    monitor.running.signal(Signal::SIGTERM);
    monitor.running.finish().ok();
}

#[test]
fn a_guest_and_a_shim_that_hang_are_said_to() {
    let Some(_turn) = is_ours(alone()) else { return };
    let [hung, silent, well] = [(); 3].map(|()| Run::new(BUSYBOX).command(&["sleep", "10000"]).start());
    let monitor = Monitor::start();
    monitor.metrics();
    let (vmm, shim) = (Process::vmm_of(hung.id()).pid, Process::shim_of(silent.id()).pid);
    let signal = |pid, signal| kill(Pid::from_raw(pid), signal).expect("a signal");
    signal(vmm, Signal::SIGSTOP);
    signal(shim, Signal::SIGSTOP);
    let begun = Instant::now();
    let text = monitor.metrics();
    let took = begun.elapsed();
    signal(shim, Signal::SIGCONT);
    signal(vmm, Signal::SIGCONT);
    let metrics = parse(&text);
    let of = |name: &str, id: &str| format!("{name}{{sandbox_id=\"{id}\"}}");
    assert_eq!(value(&metrics, &of("kata_monitor_shim_up", silent.id())), 0.0);
    assert_eq!(value(&metrics, &of("kata_shim_guest_up", hung.id())), 0.0);
    assert_eq!(value(&metrics, &of("kata_shim_guest_up", well.id())), 1.0);
    let guests = |id: &str| metrics.keys().filter(|s| s.starts_with("kata_guest_") && s.contains(id)).count();
    assert_eq!((guests(hung.id()), guests(silent.id())), (0, 0));
    assert!(guests(well.id()) > 100, "{text}");
    // A second for those who do not answer, together, and what the others take.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

/// Seconds of processors that a process has used.
fn used(pid: i32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("schedstat");
    text.split(' ').next().expect("a number").parse::<f64>().expect("a number") / 1e9
}

/// All threads: schedstat is of one.
fn used_by_all_threads(pid: i32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
    threads.map(|thread| thread.file_name().to_string_lossy().parse().map_or(0.0, used)).sum()
}

/// What it costs the host to look at pods, by its own count. In a test machine that is emulated, it is more.
#[test]
fn metrics_cost_little() {
    let Some(_turn) = is_ours(alone()) else { return };
    let count = if environment::is_soak() { 30 } else { 5 };
    let containers: Vec<_> =
        (0..count).map(|_| Run::new(BUSYBOX).command(&["sleep", "10000"]).start()).collect();
    let monitor = Monitor::start();
    let ids: Vec<_> = containers.iter().map(|one| one.id().to_owned()).collect();
    let shims: Vec<_> = ids.iter().map(|id| Process::shim_of(id).pid).collect();
    let vmms: Vec<_> = ids.iter().map(|id| Process::vmm_of(id).pid).collect();
    let is_monitor = |process: &Process| process.name == "kata-monitor";
    let monitors: Vec<_> = Process::all().into_iter().filter(is_monitor).map(|process| process.pid).collect();
    let all = |pids: &[i32]| pids.iter().map(|pid| used_by_all_threads(*pid)).sum::<f64>();
    let look = || [all(&monitors), all(&shims), all(&vmms)];
    let resident = [status(shims[0], "VmRSS"), {
        monitor.metrics();
        status(shims[0], "VmRSS")
    }];
    let (before, rounds) = (look(), 10);
    let begun = Instant::now();
    (0..rounds).for_each(|_| drop(monitor.metrics()));
    let (after, took) = (look(), begun.elapsed() / rounds);
    let per_pod = |part: usize| (after[part] - before[part]) / f64::from(rounds) / f64::from(count) * 1000.0;
    let text = format!(
        "{count} pods: {took:?}; per pod {:.2} ms of kata-monitor, {:.2} ms of the shim, {:.2} ms of VMM and guest; \
         a shim's resident memory was {} KiB, after one look {} KiB, after {rounds} more {} KiB\n",
        per_pod(0),
        per_pod(1),
        per_pod(2),
        resident[0],
        resident[1],
        status(shims[0], "VmRSS"),
    );
    println!("{text}");
    if let Some(out) = std::env::var_os("KATANA_OUT") {
        std::fs::write(Path::new(&out).join("metrics-cost"), &text).expect("a result");
    }
    // 200 pods in a second of one CPU are 5 ms for each.
    assert!(per_pod(0) + per_pod(1) < 5.0 * EMULATED, "{text}");
    assert!(status(shims[0], "VmRSS") - resident[0] < 1024.0, "{text}");
}

/// How much slower the test machine may be than a processor.
const EMULATED: f64 = 20.0;
