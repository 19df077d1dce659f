//! Many containers, one after another.

use katana_tests::host::Host;
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Run, Scratch, environment};

/// What of the host grows with something that is not given back, however small.
#[derive(Debug, Clone, Copy)]
struct Growth {
    /// Of the kernel, KiB.
    unreclaimable: u64,
    /// Cgroups that are gone for everybody but the kernel.
    dying: u64,
    /// Of containerd.
    descriptors: u64,
    /// Entries in the table of mounts.
    mounts: u64,
    processes: u64,
}

impl Growth {
    fn now(containerd: &Process) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let number = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let entries = |path: &str| std::fs::read_dir(path).map_or(0, |entries| entries.count() as u64);
        Self {
            unreclaimable: number(&text("/proc/meminfo"), "SUnreclaim:"),
            dying: number(&text("/sys/fs/cgroup/cgroup.stat"), "nr_dying_descendants"),
            descriptors: entries(&format!("/proc/{}/fd", containerd.pid)),
            mounts: text("/proc/self/mountinfo").lines().count() as u64,
            processes: Process::all().len() as u64,
        }
    }
}

/// Ten thousand of them in the long version of the tests, or as many as `$KATANA_CYCLES` says.
#[test]
fn thousands_of_cycles_grow_nothing() {
    let _turn = alone();
    let asked = std::env::var("KATANA_CYCLES").ok().and_then(|text| text.parse().ok());
    let cycles: usize = asked.unwrap_or(if environment::is_soak() { 10_000 } else { 30 });
    let scratch = Scratch::new();
    let before = Host::before();
    let containerd = || {
        let is_it = |process: &Process| {
            let address =
                katana_tests::containerd::Containerd::current().configuration().display().to_string();
            process.name == "containerd" && process.arguments.contains(&address)
        };
        Process::all().into_iter().find(is_it).expect("containerd's process")
    };
    let cycle = |number: usize| {
        let code = i32::try_from(number % 3).expect("a small number");
        // Some of everything that must be removed: a volume, a tmpfs, a cgroup with limits, a process left alone.
        let script = format!("sleep 10000 & mkdir -p /a/b; echo > /volume/file; exit {code}");
        let run = Run::new(BUSYBOX).bind(scratch.path(), "/volume", "rw").options("--memory-limit 67108864");
        run.sh(&script).output().expect_code(code);
    };
    // What is made once is not growth.
    (0..cycles / 10 + 5).for_each(cycle);
    before.expect_unchanged();
    let containerd = containerd();
    let first = Growth::now(&containerd);
    for number in 0..cycles {
        cycle(number);
        if number % 500 == 499 {
            println!("{}: {:?}", number + 1, Growth::now(&containerd));
        }
    }
    before.expect_unchanged();
    let small = |more: u64, first: u64, share: u64| more <= first + 16 + cycles as u64 / share;
    let all_small = || {
        let last = Growth::now(&containerd);
        let holds = small(last.descriptors, first.descriptors, 1000)
            && small(last.mounts, first.mounts, 1000)
            && small(last.processes, first.processes, 1000)
            && small(last.dying, first.dying, 100)
            // 16 MiB, and less than a KiB of each cycle.
            && last.unreclaimable <= first.unreclaimable + (16 << 10) + cycles as u64 / 2;
        println!("{cycles} cycles: from {first:?} to {last:?}");
        holds
    };
    assert!(katana_tests::host::eventually(all_small), "something grows");
}
