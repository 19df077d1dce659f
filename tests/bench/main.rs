//! Katana against runc and other peers in the same run: how long starts take, what a container at rest costs in memory,
//! and how fast network and file systems are. Run it as root below `tests/with-containerd`; `start`, `memory`,
//! `timeline` or `io` as arguments measure parts, `io:TEXT` the rows about files whose names contain TEXT. Figures go to files in $KATANA_OUT or target/bench: start.json, with
//! the memory's, and io.json; pictures to start.svg, timeline-*.svg and io.svg.

mod chart;
mod files;
mod memory;
mod network;
mod peers;
mod start;
mod timeline;

use std::path::{Path, PathBuf};

use katana_tests::environment;
use serde_json::{Value, json};

use crate::chart::Chart;

fn main() {
    let file = std::env::var_os("OUT").map(PathBuf::from);
    let directory =
        std::env::var_os("KATANA_OUT").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == part);
    let runtime = environment::runtime();
    let mut chart = Chart::default();
    let mut figures = Value::Object(serde_json::Map::new());
    for (part, measure) in [("start", start::run as fn(&str, &mut Chart) -> Value), ("memory", memory::run)] {
        if wants(part)
            && let (Value::Object(all), Value::Object(more)) = (&mut figures, measure(&runtime, &mut chart))
        {
            all.extend(more);
        }
    }
    if wants("start") || wants("memory") {
        let file = file.unwrap_or_else(|| directory.join("start.json"));
        write(&file.with_extension("svg"), &chart.svg());
        write(&file, &format!("{figures:#}\n"));
    }
    if wants("timeline") {
        timeline::run(&runtime, &directory);
    }
    let rows = wanted.iter().find_map(|wanted| wanted.strip_prefix("io:"));
    if wants("io") || rows.is_some() {
        // Where the clock counts instructions, a client that waits for its server costs nothing.
        let network =
            if environment::is_counted() || rows.is_some() { Value::Null } else { network::run(&runtime) };
        files::run(rows.unwrap_or_default(), |rows, picture| {
            write(&directory.join("io.svg"), picture);
            let figures = json!({"network": network, "files": rows});
            write(&directory.join("io.json"), &format!("{figures:#}\n"));
        });
    }
    println!("written to {}", directory.display());
}

/// Writes a result.
fn write(path: &Path, text: &str) {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    }
    std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
