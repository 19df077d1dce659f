//! Network: what a container does in a virtual machine against what it does with runc, in the same run.

use katana_tests::environment::RUNC;
use katana_tests::network::{Bridge, Namespace};
use katana_tests::{BENCH, Container, NGINX, Run};
use serde_json::{Value, json};

/// How long one figure is measured.
const SECONDS: u32 = 3;

/// What is measured; more is better.
struct Row {
    name: String,
    unit: &'static str,
    runc: f64,
    kata: f64,
}

impl Row {
    /// How fast Katana is when runc is 1.
    fn ratio(&self) -> f64 {
        (self.kata / self.runc * 100.0).round() / 100.0
    }
}

/// Measures, prints a table, and answers the figures.
pub fn run(runtime: &str) -> Value {
    let measure = |runtime: &str| {
        eprintln!("with {runtime}:");
        network(runtime)
    };
    let [runc, kata] = [RUNC, runtime].map(measure);
    let row = |((name, unit, runc), (_, _, kata)): (Figure, Figure)| Row { name, unit, runc, kata };
    let rows: Vec<Row> = runc.into_iter().zip(kata).map(row).collect();
    println!("network                                         runc       kata      ratio, of speeds");
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

fn json_of(container: &Container, script: &str) -> Value {
    let output = container.exec_command(&[], &["bash", "-c", script]).patiently().output().ok();
    let text = output.text();
    serde_json::from_str(&text[text.find('{').unwrap_or(0)..]).unwrap_or_else(|e| panic!("{e}: {output}"))
}
