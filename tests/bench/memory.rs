//! What a container at rest costs in memory.

use std::time::Duration;

use katana_tests::environment::RUNC;
use katana_tests::process::Process;
use katana_tests::{BUSYBOX, Container, Run};
use serde_json::{Value, json};

use crate::chart::Chart;
use crate::peers::Runsc;

/// A mapping of this size or more in the VMM is memory of its guest.
const LEAST_GUEST_KIB: u64 = 64 << 10;
/// Containers that are there at once when the host's free memory is looked at.
const MANY: usize = 30;
/// Until what was started is at rest.
const SETTLE: Duration = Duration::from_secs(5);

/// Measures, prints a table, draws a chart, and answers the figures.
pub fn run(runtime: &str, chart: &mut Chart) -> Value {
    let of_one = Memory::of_container_at_rest(runtime);
    let of_runc = Memory::of_container_at_rest(RUNC);
    let [runc, kata] = [RUNC, runtime].map(|runtime| per_container(runtime, ""));
    let runsc = Runsc::find().map(|runsc| per_container(RUNC, &runsc.options()));
    let ratio = (kata / runc * 100.0).round() / 100.0;
    println!("memory of a container at rest            resident   its share (PSS)   private");
    for (name, size) in [
        ("shim of runc", &of_runc.shim),
        ("shim of kata", &of_one.shim),
        ("kata-vmm, with the guest", &of_one.vmm),
    ] {
        println!("  {name:36} {:8} KiB {:8} KiB {:8} KiB", size.resident, size.share, size.private);
    }
    let rest = of_one.vmm.private.saturating_sub(of_one.guest);
    println!("    the guest's memory in it           {:8} KiB", of_one.guest);
    println!("    private without it                                            {rest:8} KiB");
    println!(
        "less memory available, for each of {MANY}: runc {runc:.0} KiB, kata {kata:.0} KiB, ratio {ratio:.2}"
    );
    let mut bars = vec![("runc", runc / 1024.0), ("kata", kata / 1024.0)];
    bars.extend(runsc.as_ref().ok().map(|runsc| ("runsc", runsc / 1024.0)));
    chart.group(&format!("memory of each of {MANY} containers, MiB"), &bars);
    let runsc = match runsc {
        Ok(runsc) => {
            println!("  runsc {runsc:.0} KiB");
            json!({"kib": runsc.round()})
        }
        Err(reason) => {
            println!("  runsc skipped: {reason}");
            chart.note(&format!("runsc skipped: {reason}"));
            json!({"skipped": reason})
        }
    };
    json!({
        "rss_kib": {"shim": of_one.shim.resident, "vmm": of_one.vmm.resident, "guest": of_one.guest,
                    "runc_shim": of_runc.shim.resident},
        "pss_kib": {"shim": of_one.shim.share, "vmm": of_one.vmm.share, "runc_shim": of_runc.shim.share},
        "private_kib": {"shim": of_one.shim.private, "vmm_without_guest": rest, "guest": of_one.guest},
        "available_kib_each": {"containers": MANY, "runc": runc.round(), "kata": kata.round(), "ratio": ratio,
                               "runsc": runsc},
    })
}

/// By how much less memory is available, in KiB, with these options of `ctr run`.
fn per_container(runtime: &str, options: &str) -> f64 {
    let start = || -> Container {
        Run::new(BUSYBOX).runtime(runtime).options(options).command(&["sleep", "10000"]).start()
    };
    // What the first one brings in for all is not what each costs.
    let first = start();
    std::thread::sleep(SETTLE);
    let before = available();
    let containers: Vec<Container> = (0..MANY).map(|_| start()).collect();
    std::thread::sleep(SETTLE);
    let after = available();
    drop((containers, first));
    (before - after) / MANY as f64
}

fn available() -> f64 {
    field(&read("/proc/meminfo"), "MemAvailable:") as f64
}

/// In KiB.
struct Size {
    resident: u64,
    share: u64,
    private: u64,
}

impl Size {
    fn of(process: &Process) -> Self {
        let rollup = read(&format!("/proc/{}/smaps_rollup", process.pid));
        let private = field(&rollup, "Private_Clean:") + field(&rollup, "Private_Dirty:");
        Self { resident: field(&rollup, "Rss:"), share: field(&rollup, "Pss:"), private }
    }
}

/// In KiB.
struct Memory {
    shim: Size,
    vmm: Size,
    guest: u64,
}

impl Memory {
    fn of_container_at_rest(runtime: &str) -> Self {
        // Two of them: what programs have in common is not private then.
        let [container, _other] =
            [(); 2].map(|()| Run::new(BUSYBOX).runtime(runtime).command(&["sleep", "1000"]).start());
        std::thread::sleep(SETTLE);
        let shim = Size::of(&Process::shim_of(container.id()));
        if runtime == RUNC {
            return Self { shim, vmm: Size { resident: 0, share: 0, private: 0 }, guest: 0 };
        }
        let vmm = Process::vmm_of(container.id());
        let guest = guest_memory(&read(&format!("/proc/{}/smaps", vmm.pid)));
        Self { shim, vmm: Size::of(&vmm), guest }
    }
}

/// proc_pid_smaps(5), private pages in KiB. Memory comes in mappings that lie side by side: without a path, or of a
/// template. Other files, such as the guest's image, are not counted.
fn guest_memory(smaps: &str) -> u64 {
    let mut total = 0;
    // Of the mappings side by side: where they end, their size, their private pages.
    let mut run = (0, 0, 0);
    let mut is_memory = false;
    for line in smaps.lines().chain(["0-0 - - - - /"]) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Size:", size, _] if is_memory => run.1 += number(size),
            ["Private_Clean:" | "Private_Dirty:", size, _] if is_memory => run.2 += number(size),
            [range, _, _, _, _, path @ ..] if range.contains('-') => {
                let (start, end) = range.split_once('-').unwrap_or_default();
                let address = |text| u64::from_str_radix(text, 16).unwrap_or(0);
                is_memory = path.first().is_none_or(|path| {
                    ["/memfd:", "[anon", "/run/kata-containers/template/"]
                        .iter()
                        .any(|start| path.starts_with(start))
                });
                if !is_memory || address(start) != run.0 {
                    total += if run.1 >= LEAST_GUEST_KIB { run.2 } else { 0 };
                    run = (0, 0, 0);
                }
                run.0 = address(end);
            }
            _ => {}
        }
    }
    total
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    value.map_or(0, number)
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}
