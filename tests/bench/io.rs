//! Network and file systems: what a container does in a virtual machine against what it does with runc, in the same
//! run.

use katana_tests::environment::RUNC;
use katana_tests::network::{Bridge, Namespace};
use katana_tests::scratch::noise;
use katana_tests::{BENCH, Command, Container, NGINX, Run, Scratch};
use serde_json::{Value, json};

/// How long one figure is measured.
const SECONDS: u32 = 3;
const FILES: usize = 10_000;

/// What is measured. For all units but seconds, more is better.
struct Row {
    name: String,
    unit: &'static str,
    runc: f64,
    kata: f64,
}

impl Row {
    /// How fast Katana is when runc is 1.
    fn ratio(&self) -> f64 {
        let (more, less) = if self.unit == "s" { (self.runc, self.kata) } else { (self.kata, self.runc) };
        (more / less * 100.0).round() / 100.0
    }
}

/// Measures, prints a table, and answers the figures.
pub fn run(runtime: &str) -> Value {
    let measure = |runtime: &str| {
        eprintln!("with {runtime}:");
        [network(runtime), files(runtime)].concat()
    };
    let [runc, kata] = [RUNC, runtime].map(measure);
    let row = |((name, unit, runc), (_, _, kata)): (Figure, Figure)| Row { name, unit, runc, kata };
    let rows: Vec<Row> = runc.into_iter().zip(kata).map(row).collect();
    println!("network and file systems                        runc       kata      ratio, of speeds");
    for row in &rows {
        let Row { name, unit, runc, kata } = row;
        println!("  {name:40} {runc:10.2} {kata:10.2} {:10.2}  {unit}", row.ratio());
    }
    let rows = rows.iter().map(|row| {
        json!({"name": row.name, "unit": row.unit, "runc": row.runc, "kata": row.kata, "ratio": row.ratio()})
    });
    Value::Array(rows.collect())
}

type Figure = (String, &'static str, f64);

fn figure(name: &str, unit: &'static str, value: f64) -> Figure {
    // It takes minutes until the table is complete.
    eprintln!("{name}: {value:.2} {unit}");
    (name.to_owned(), unit, value)
}

/// Clients on the host, which are containers of runc so that nothing has to be installed there, and servers in a
/// container.
fn network(runtime: &str) -> Vec<Figure> {
    let bridge = Bridge::new(1500);
    let [address, _] = bridge.addresses(2);
    let namespace = Namespace::new();
    bridge.connect(namespace.name(), "eth0", 2);
    let client = Run::new(BENCH).runtime(RUNC).options("--net-host").command(&["sleep", "10000"]).start();
    let serve = |image: &str, words: &[&str]| {
        Run::new(image).runtime(runtime).options(&namespace.option()).command(words).start()
    };

    let server = serve(BENCH, &["iperf3", "--server"]);
    let iperf3 = |options: &str| {
        let script = format!(
            "for i in $(seq 100); do busybox nc -w 1 {address} 5201 </dev/null && break; sleep 0.1; done
             iperf3 --client {address} --time {SECONDS} --json {options}"
        );
        let answer = json_of(&client, &script);
        answer["end"]["sum_received"]["bits_per_second"].as_f64().expect("a figure of iperf3") / 1e9
    };
    let mut figures = vec![
        figure("iperf3, to the container", "Gbit/s", iperf3("")),
        figure("iperf3, from the container", "Gbit/s", iperf3("--reverse")),
        figure("iperf3, to the container, 4 streams", "Gbit/s", iperf3("--parallel 4")),
    ];
    drop(server);

    let _server = serve(NGINX, &["nginx", "-g", "daemon off;"]);
    let wrk = format!(
        "for i in $(seq 100); do busybox wget -q -O /dev/null http://{address}/ && break; sleep 0.1; done
         wrk --threads 2 --connections 20 --duration {SECONDS}s http://{address}/"
    );
    let text = client.sh(&wrk).ok().text();
    let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:")?.trim().parse().ok());
    figures.push(figure("nginx, requests", "1/s", rate.unwrap_or_else(|| panic!("{text}"))));
    figures
}

/// fio and tar in a container: fio on its root file system and on a directory of the host, tar on the former.
fn files(runtime: &str) -> Vec<Figure> {
    let (volume, input) = (Scratch::new(), Scratch::new());
    archive(&input);
    let run =
        Run::new(BENCH).runtime(runtime).bind(volume.path(), "/volume", "rw").bind(input.path(), "/in", "ro");
    let container = run.command(&["sleep", "10000"]).start();
    let mut figures = Vec::new();
    for (place, directory) in [("root", "/root"), ("volume", "/volume")] {
        for (name, job, unit) in [
            ("sequential write", "--rw=write --bs=1M --end_fsync=1", "MiB/s"),
            ("sequential read", "--rw=read --bs=1M", "MiB/s"),
            ("random 4k write", "--rw=randwrite --bs=4k --end_fsync=1", "1/s"),
            ("random 4k read", "--rw=randread --bs=4k", "1/s"),
        ] {
            let script = format!(
                "fio --name=x --filename={directory}/file --size=128M --ioengine=psync --invalidate=0 \
                 --time_based --runtime={SECONDS} --output-format=json {job}"
            );
            let answer = json_of(&container, &script);
            let of = &answer["jobs"][0][if job.contains("write") { "write" } else { "read" }];
            let (bytes, rate) = (of["bw_bytes"].as_f64(), of["iops"].as_f64());
            let value = if unit == "1/s" { rate } else { bytes.map(|bytes| bytes / f64::from(1 << 20)) };
            figures.push(figure(&format!("fio, {place}, {name}"), unit, value.expect("a figure of fio")));
        }
    }
    let script = "mkdir /root/x; start=$(date +%s%N); tar xf /in/archive -C /root/x
         echo milliseconds=$((($(date +%s%N) - start) / 1000000))";
    let output = container.exec_command(&[], &["sh", "-c", script]).patiently().output().ok();
    let time = output.value("milliseconds").and_then(|text| text.parse::<f64>().ok());
    let name = format!("tar x of {FILES} files, root");
    figures.push(figure(&name, "s", time.unwrap_or_else(|| panic!("{output}")) / 1000.0));
    figures
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

fn json_of(container: &Container, script: &str) -> Value {
    let output = container.exec_command(&[], &["bash", "-c", script]).patiently().output().ok();
    let text = output.text();
    serde_json::from_str(&text[text.find('{').unwrap_or(0)..]).unwrap_or_else(|e| panic!("{e}: {output}"))
}
