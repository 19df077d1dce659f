//! How long `ctr run --rm busybox true` takes with Katana and with runc, in turns, what a container at rest costs in
//! memory, and how fast network and file systems are. Run it as root below `tests/with-containerd`; `start` or `io` as an
//! argument measures one of them. The figures of a start go to the file $OUT, or to start.json in $KATANA_OUT, or to
//! target/bench/start.json; the others to io.json in $KATANA_OUT or target/bench.

mod io;

use std::path::{Path, PathBuf};
use std::time::Duration;

use katana_tests::environment::{self, RUNC};
use katana_tests::process::Process;
use katana_tests::{BUSYBOX, Run};
use serde_json::{Value, json};

const ROUNDS: usize = 10;
/// A mapping of this size or more in the VMM is memory of its guest.
const LEAST_GUEST_KIB: u64 = 64 << 10;

fn main() {
    let file = std::env::var_os("OUT").map(PathBuf::from);
    let directory =
        std::env::var_os("KATANA_OUT").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    let wanted = std::env::args().nth(1);
    let wants = |part: &str| wanted.as_ref().is_none_or(|wanted| wanted == part);
    let runtime = environment::runtime();
    if wants("start") {
        write(&file.unwrap_or_else(|| directory.join("start.json")), &start(&runtime));
    }
    if wants("io") {
        write(&directory.join("io.json"), &io::run(&runtime));
    }
}

fn start(runtime: &str) -> Value {
    let mut times = measure(&[RUNC, runtime]);
    let (kata, runc) = (times.remove(1), times.remove(0));
    let memory = Memory::of_container_at_rest(runtime);
    let runc_memory = Memory::of_container_at_rest(RUNC);

    let ratio = |of: fn(&Times) -> f64| (of(&kata) / of(&runc) * 100.0).round() / 100.0;
    let (best, median) = (ratio(Times::best), ratio(Times::median));
    println!("ctr run --rm {BUSYBOX} true      best       median     of {ROUNDS}");
    println!("  runc                            {:7.0} ms {:7.0} ms", runc.best(), runc.median());
    println!("  kata                            {:7.0} ms {:7.0} ms", kata.best(), kata.median());
    println!("  ratio                           {best:7.2}    {median:7.2}");
    println!("memory of a container at rest     resident   its share (PSS)");
    println!(
        "  shim of runc                    {:7} KiB {:5} KiB",
        runc_memory.shim.resident, runc_memory.shim.share
    );
    println!("  shim of kata                    {:7} KiB {:5} KiB", memory.shim.resident, memory.shim.share);
    println!("  kata-vmm, with the guest        {:7} KiB {:5} KiB", memory.vmm.resident, memory.vmm.share);
    println!("    the guest's memory in it      {:7} KiB", memory.guest);
    println!("    without it                    {:7} KiB", memory.vmm.resident.saturating_sub(memory.guest));

    json!({
        "runc_ms": runc.to_json(),
        "kata_ms": kata.to_json(),
        "ratio": {"best": best, "median": median},
        "rss_kib": {"shim": memory.shim.resident, "vmm": memory.vmm.resident, "guest": memory.guest,
                    "runc_shim": runc_memory.shim.resident},
        "pss_kib": {"shim": memory.shim.share, "vmm": memory.vmm.share, "runc_shim": runc_memory.shim.share},
    })
}

/// Runs each runtime in turn, so that all have the same machine.
fn measure(runtimes: &[&str]) -> Vec<Times> {
    let run = |runtime: &str| Run::new(BUSYBOX).runtime(runtime).command(&["true"]).output().ok().elapsed;
    let mut times: Vec<Times> = runtimes.iter().map(|_| Times(Vec::new())).collect();
    for runtime in runtimes {
        // The first start after boot reads everything from disk.
        run(runtime);
    }
    for _ in 0..ROUNDS {
        for (times, runtime) in times.iter_mut().zip(runtimes) {
            times.0.push(run(runtime));
        }
    }
    for times in &mut times {
        times.0.sort();
    }
    times
}

/// In order.
struct Times(Vec<Duration>);

impl Times {
    fn best(&self) -> f64 {
        self.0[0].as_secs_f64() * 1000.0
    }

    fn median(&self) -> f64 {
        let (low, high) = (self.0[(self.0.len() - 1) / 2], self.0[self.0.len() / 2]);
        (low + high).as_secs_f64() * 500.0
    }

    fn to_json(&self) -> Value {
        json!({"best": self.best().round(), "median": self.median().round()})
    }
}

/// In KiB.
struct Size {
    resident: u64,
    share: u64,
}

impl Size {
    fn of(process: &Process) -> Self {
        let rollup = read(&format!("/proc/{}/smaps_rollup", process.pid));
        Self { resident: field(&rollup, "Rss:"), share: field(&rollup, "Pss:") }
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
        const SETTLE: Duration = Duration::from_secs(3);
        let container = Run::new(BUSYBOX).runtime(runtime).command(&["sleep", "1000"]).start();
        std::thread::sleep(SETTLE);
        let shim = Size::of(&Process::shim_of(container.id()));
        if runtime == RUNC {
            return Self { shim, vmm: Size { resident: 0, share: 0 }, guest: 0 };
        }
        let vmm = Process::vmm_of(container.id());
        let guest = guest_memory(&read(&format!("/proc/{}/smaps", vmm.pid)));
        Self { shim, vmm: Size::of(&vmm), guest }
    }
}

/// proc_pid_smaps(5): each mapping's `Size` comes before its `Rss`. Files, such as the guest's image, have a path; memory
/// has none, or that of a memfd.
fn guest_memory(smaps: &str) -> u64 {
    let mut total = 0;
    let (mut is_memory, mut is_large) = (false, false);
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Size:", size, _] => is_large = number(size) >= LEAST_GUEST_KIB,
            ["Rss:", resident, _] if is_memory && is_large => total += number(resident),
            [range, _, _, _, _, path @ ..] if range.contains('-') => {
                is_memory =
                    path.first().is_none_or(|path| path.starts_with("/memfd:") || path.starts_with("[anon"));
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

fn write(path: &Path, result: &Value) {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    }
    std::fs::write(path, format!("{result:#}\n")).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    println!("written to {}", path.display());
}
