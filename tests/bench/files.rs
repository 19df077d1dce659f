//! File systems: what files cost in a pod of Katana's against one of runc's, by work of a fixed size.
//!
//! The root is the container's, the volume a directory of the host. All data is in the host's page cache, but for what a
//! pod of Katana's has written to its root, which is in the guest's.

use std::path::Path;
use std::time::Duration;

use katana_tests::cri::{Container, Pod};
use katana_tests::environment;
use katana_tests::scratch::noise;
use katana_tests::{BENCH, Command, DEBIAN, POSTGRES, Scratch};
use serde_json::{Value, json};

use crate::chart::Chart;

/// Of tar's archive.
const FILES: usize = 10_000;
/// Where work is done: in the root or in the volume.
const PLACES: [(&str, &str); 2] = [("root", "/root"), ("volume", "/volume")];

/// One kind of work.
struct Work {
    name: String,
    image: &'static str,
    /// Of what there are `count` in it.
    unit: &'static str,
    count: f64,
    /// What is done before, unmeasured, and the work itself.
    prepare: String,
    work: String,
    /// The least that is aimed at, with runc's speed as 1.
    aim: f64,
}

/// Shell functions: `fill FILE MIB` writes a file; `fio FILE OPTION...` prints what reading or writing it took, in
/// nanoseconds, without fio's own start; `old` waits until a change of what was written has another time; `largest` prints
/// the name of a file of the image.
const FUNCTIONS: &str = r#"
    fill() { dd if=/dev/zero of="$1" bs=1M count="$2" conv=fsync 2>/dev/null; }
    fio() {
        local file=$1; shift
        command fio --name=x --filename="$file" --thread --ioengine=psync --invalidate=0 --output-format=json "$@" |
            busybox awk '/"runtime"/ { gsub(/[^0-9]/, "", $3); if ($3 > most) most = $3 } END { printf "ns=%d000000\n", most }'
    }
    old() { sleep 4; }
    largest() { find /usr -type f -printf '%s %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2; }
    timed() { local start=$(date +%s%N); "$@"; echo "ns=$(($(date +%s%N) - start))"; }
"#;

/// Nothing to prepare: what is read is the image's, which a container of runc's has read before, so that the host has it.
const IMAGE: &str = ":";

fn all_work() -> Vec<Work> {
    let mut all = Vec::new();
    let mut add = |name: &str, unit, count, aim, prepare: &str, work: &str| {
        let (name, prepare, work) = (name.to_owned(), prepare.to_owned(), work.to_owned());
        all.push(Work { name, image: BENCH, unit, count, prepare, work, aim });
    };
    for (place, directory) in PLACES {
        let file = format!("{directory}/file");
        let fill = format!("fill {file} 32; old");
        let read = format!("{fill}; cat {file} >/dev/null; cat {file} >/dev/null");
        let name = |what: &str| format!("{place}: {what}");
        let sequential = format!("fio {file} --rw=read --bs=1M --size=32M");
        let fill_more = format!("fill {file} 64; old");
        let touch = format!("fio {file} --ioengine=mmap --rw=read --bs=4k --size=64M");
        // A container's own root has what the container has written in the guest's page cache.
        if place == "root" {
            let first = "fio $(largest) --readonly --rw=read --bs=1M --size=16M";
            add(&name("sequential read 1 MiB of the image, first time"), "MiB", 16.0, 0.6, IMAGE, first);
        } else {
            add(&name("sequential read 1 MiB, first time"), "MiB", 32.0, 0.6, &fill, &sequential);
            add(&name("pages of a mapping, first time"), "page", 16384.0, 0.7, &fill_more, &touch);
        }
        add(&name("sequential read 1 MiB, read before"), "MiB", 32.0, 0.9, &read, &sequential);
        let random = format!("fio {file} --rw=randread --bs=4k --size=32M --io_size=16M");
        add(&name("random read 4 KiB, read before"), "read", 4096.0, 0.9, &read, &random);
        let again = format!("{fill_more}; {touch} >/dev/null");
        add(&name("pages of a mapping, second time"), "page", 16384.0, 0.95, &again, &touch);
        let aim = if place == "root" { 0.7 } else { 0.4 };
        let write = format!("fio {file} --rw=randwrite --bs=4k --size=32M --io_size=8M --end_fsync=1");
        add(&name("random write 4 KiB, fsync at the end"), "write", 2048.0, aim, &fill, &write);
        let write = format!("fio {file} --rw=write --bs=1M --size=32M --end_fsync=1");
        add(&name("sequential write 1 MiB, fsync at the end"), "MiB", 32.0, aim, "true", &write);
    }
    let many = "many() { local n=0; while [ $n -lt 1000 ]; do echo $n >/root/many/$n; n=$((n + 1)); done; }";
    add(
        "root: create, write and close a file",
        "file",
        1000.0,
        0.6,
        &format!("mkdir /root/many; {many}"),
        "timed many",
    );
    let unpack = "mkdir /root/x; unpack() { tar xf /in/archive -C /root/x; }";
    add("root: tar x, a file", "file", FILES as f64, 0.6, unpack, "timed unpack");
    add(
        "root: rm -r, a file",
        "file",
        FILES as f64,
        0.6,
        &format!("{unpack}; unpack"),
        "timed rm -r /root/x",
    );
    let find = "look() { find /usr >/dev/null; }; look";
    add("root: find /usr, second time", "run", 1.0, 0.85, find, "timed look");
    let small = "mkdir /root/n; for n in $(seq 500); do echo $n >/root/n/$n; done; show() { cat /root/n/* >/dev/null; }";
    add(
        "root: open, read and close a file, second time",
        "file",
        500.0,
        0.85,
        &format!("{small}; show"),
        "timed show",
    );
    let files = "for n in $(seq 16); do fill /volume/$n 4; done; old
        readers() { local n; for n in $(seq 16); do cat /volume/$n >/dev/null & done; wait; }";
    add("volume: 16 readers of files of 4 MiB, first time", "MiB", 64.0, 0.6, files, "timed readers");
    all.extend(programs());
    all
}

/// What people run: a start of Python, packages, Git, a database.
fn programs() -> Vec<Work> {
    let of = |image, name: &str, unit, count, aim, prepare: &str, work: &str| {
        let (name, prepare, work) = (format!("root: {name}"), prepare.to_owned(), work.to_owned());
        Work { name, image, unit, count, prepare, work, aim }
    };
    let modules = "import json, re, subprocess, urllib.request, sqlite3, ssl, asyncio, decimal, xml.dom.minidom, ctypes";
    let python = format!("load() {{ python3 -c '{modules}'; }}; load");
    let apt = "apt-get update >/dev/null; install() { apt-get install -y jq >/dev/null 2>&1; }";
    let repository = "export HOME=/root; git config --global user.email a@b; git config --global user.name a
        git init -q /root/tree; tar xf /in/archive -C /root/tree; cd /root/tree; rm -rf directory-[5-9]?
        git add -A; git commit -q -m a; status() { git status --short; }; status; cd /";
    let status = "cd /root/tree; timed status";
    let clone = "copy() { git clone -q --no-local /root/tree /root/copy; }";
    let database = "export PGDATA=/var/lib/postgresql/data
        initdb >/dev/null; pg_ctl -w -l /tmp/log start >/dev/null; pgbench -q -i -s 1 postgres 2>/dev/null
        work() { pgbench -t 200 postgres >/dev/null 2>&1; }; work";
    vec![
        of(DEBIAN, "python3 imports ten modules, second time", "run", 1.0, 0.85, &python, "timed load"),
        of(DEBIAN, "apt-get install jq", "run", 1.0, 0.6, apt, "timed install"),
        of(BENCH, "git status of 5,000 files, second time", "run", 1.0, 0.85, repository, status),
        of(
            BENCH,
            "git clone of 5,000 files",
            "run",
            1.0,
            0.6,
            &format!("{repository}; {clone}"),
            "timed copy",
        ),
        of(
            POSTGRES,
            "pgbench, a transaction",
            "transaction",
            200.0,
            0.6,
            database,
            "timed work; pg_ctl -m fast stop >/dev/null",
        ),
    ]
}

/// Measures the rows whose names contain `wanted`, prints a table row by row, and gives the figures so far and their
/// picture to `written` after each.
pub fn run(wanted: &str, mut written: impl FnMut(&[Value], &str)) {
    let input = Scratch::new();
    archive(&input);
    let (unit, short) = if environment::is_counted() {
        ("thousands of instructions", "1000 instructions")
    } else {
        ("microseconds", "µs")
    };
    println!(
        "files, {unit} each                                       runc       kata  kata's speed, runc = 1 (aim)"
    );
    let (mut rows, mut chart) = (Vec::new(), Chart::default());
    for work in all_work().into_iter().filter(|work| work.name.contains(wanted)) {
        if work.prepare == IMAGE {
            measure(&work, "runc", &input);
        }
        let [runc, kata] = ["runc", "kata"].map(|handler| measure(&work, handler, &input));
        let ratio = (runc / kata * 100.0).round() / 100.0;
        let Work { name, unit, aim, .. } = &work;
        println!("  {name:48} {runc:10.1} {kata:10.1}   {ratio:.2} ({aim:.2})  {unit}");
        rows.push(
            json!({"name": name, "unit": unit, "runc": runc, "kata": kata, "ratio": ratio, "aim": aim}),
        );
        chart.group(&format!("{name}: {short} for each {unit}"), &[("runc", runc), ("kata", kata)]);
        written(&rows, &chart.svg());
    }
}

/// What one of the work's units takes, in microseconds or thousands of instructions.
fn measure(work: &Work, handler: &str, input: &Scratch) -> f64 {
    let volume = Scratch::new();
    let mount = |path: &Path, to: &str| json!({"host_path": path, "container_path": to});
    let pod = Pod::run(handler);
    let mounts = [mount(volume.path(), "/volume"), mount(input.path(), "/in")];
    let config = json!({"image": {"image": work.image}, "command": ["sleep", "10000"], "mounts": mounts});
    let container: Container = pod.start(config);
    let script = format!("set -e\n{FUNCTIONS}\n{}\n{}", work.prepare, work.work);
    let output = container.exec(&["bash", "-c", &script]);
    let time =
        output.ok().lines().filter_map(|line| line.strip_prefix("ns=")?.parse::<f64>().ok()).next_back();
    let time = time.unwrap_or_else(|| panic!("{}: {output:?}", work.name));
    let time = environment::counted(Duration::from_secs_f64(time / 1e9)).as_secs_f64() * 1e6;
    (time / work.count * 10.0).round() / 10.0
}

/// Files of 1 to 4 KiB in a hundred directories.
fn archive(to: &Scratch) {
    let from = Scratch::new();
    let content = noise(4096, 11);
    for number in 0..FILES {
        let directory = from.path().join(format!("directory-{}", number % 100));
        let written = std::fs::create_dir_all(&directory).and_then(|()| {
            std::fs::write(directory.join(format!("file-{number}")), &content[..1024 + number % 3072])
        });
        written.unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    }
    let (from, file) = (from.path().display().to_string(), to.path().join("archive").display().to_string());
    Command::new(&["tar", "cf", &file, "-C", &from, "."]).output().ok();
}
