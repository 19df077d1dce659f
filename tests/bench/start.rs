//! How long starts take, with Katana from its template, with Katana booting, and with runc, in turns.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use katana_tests::cri::Pod;
use katana_tests::environment::{self, RUNC};
use katana_tests::{BUSYBOX, Configuration, Run, Scratch};
use serde_json::{Value, json};

use crate::chart::Chart;

const ROUNDS: usize = 20;
/// Where the clock counts instructions, and runs repeat.
const COUNTED_ROUNDS: usize = 7;
/// Of what takes longer.
const FEW_ROUNDS: usize = 5;
/// Containers that are started at once.
const AT_ONCE: [usize; 3] = [1, 10, 30];

/// Who starts containers: a runtime, for Katana with a configuration.
struct Subject {
    name: &'static str,
    runtime: String,
    configuration: Option<PathBuf>,
}

impl Subject {
    fn run(&self, words: &[&str]) -> Run {
        let run = Run::new(BUSYBOX).runtime(&self.runtime).command(words);
        match &self.configuration {
            Some(path) => run.configuration(path),
            None => run,
        }
    }
}

/// Measures, prints a table, draws a chart, and answers the figures.
pub fn run(runtime: &str, chart: &mut Chart) -> Value {
    let scratch = Scratch::new();
    let cold = Configuration::installed().set("factory.enable_template", false);
    let cold = scratch.file("configuration.toml", cold.to_toml());
    let subject =
        |name, runtime: &str, configuration| Subject { name, runtime: runtime.to_owned(), configuration };
    let runc = subject("runc", RUNC, None);
    let kata = subject("kata", runtime, None);
    let cold = subject("kata, booting", runtime, Some(cold));

    let rounds = if environment::is_counted() { COUNTED_ROUNDS } else { ROUNDS };
    let runs =
        measure(rounds, &[&runc, &kata, &cold], |subject| subject.run(&["true"]).output().ok().elapsed);
    let execs = {
        let containers = [&runc, &kata].map(|subject| subject.run(&["sleep", "10000"]).start());
        measure(rounds, &[0, 1], |index| containers[*index].exec(&["true"]).ok().elapsed)
    };
    let pods = measure(FEW_ROUNDS, &["runc", "kata"], |handler| {
        let start = Instant::now();
        let pod = Pod::run(handler);
        let container = pod.start(json!({"command": ["sleep", "10000"]}));
        let elapsed = start.elapsed();
        drop((container, pod));
        elapsed
    });

    let mut table = Table { chart, rows: Vec::new() };
    table.row("ctr run --rm busybox true", &runc, &runs[0], &kata, &runs[1]);
    table.row("the same, without a template", &runc, &runs[0], &cold, &runs[2]);
    table.row("exec true", &runc, &execs[0], &kata, &execs[1]);
    table.row("pod with a container, to running", &runc, &pods[0], &kata, &pods[1]);
    for count in at_once() {
        let [one, other] = [&runc, &kata].map(|subject| Times(vec![starts_at_once(subject, count)]));
        table.row(&format!("{count} at once, each"), &runc, &one, &kata, &other);
    }
    let ratio = |of: fn(&Times) -> f64| round(of(&runs[1]) / of(&runs[0]));
    json!({
        "runc_ms": runs[0].to_json(),
        "kata_ms": runs[1].to_json(),
        "kata_cold_ms": runs[2].to_json(),
        "ratio": {"best": ratio(Times::best), "median": ratio(Times::median)},
        "rows": table.rows,
    })
}

/// A clock that counts instructions is in a machine too slow for many.
fn at_once() -> impl Iterator<Item = usize> {
    AT_ONCE.into_iter().filter(|count| *count == 1 || !environment::is_counted())
}

/// Lets each in turn do it, so that all have the same machine.
fn measure<S>(rounds: usize, subjects: &[S], what: impl Fn(&S) -> Duration) -> Vec<Times> {
    let mut times: Vec<Times> = subjects.iter().map(|_| Times(Vec::new())).collect();
    for subject in subjects {
        // The first one after boot reads everything from disk, and makes the template.
        what(subject);
    }
    for _ in 0..rounds {
        for (times, subject) in times.iter_mut().zip(subjects) {
            times.0.push(what(subject));
        }
    }
    for times in &mut times {
        times.0.sort();
    }
    times
}

/// Starts so many, and answers the time for each.
fn starts_at_once(subject: &Subject, count: usize) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..count).map(|_| scope.spawn(|| subject.run(&["true"]).patiently().output().ok())).collect();
        for run in runs {
            run.join().expect("a container");
        }
    });
    start.elapsed() / u32::try_from(count).expect("a small number")
}

struct Table<'a> {
    chart: &'a mut Chart,
    rows: Vec<Value>,
}

impl Table<'_> {
    fn row(&mut self, what: &str, one: &Subject, times: &Times, other: &Subject, others: &Times) {
        if self.rows.is_empty() {
            println!("times in ms, best and median              runc             kata          ratio");
        }
        let (best, median) = (round(others.best() / times.best()), round(others.median() / times.median()));
        println!(
            "  {what:34} {:7.1} {:7.1}  {:7.1} {:7.1}  {best:5.2} {median:5.2}",
            times.best(),
            times.median(),
            others.best(),
            others.median()
        );
        self.chart
            .group(&format!("{what}, ms"), &[(one.name, times.median()), (other.name, others.median())]);
        self.rows.push(json!({
            "name": what, "runc_ms": times.to_json(), "kata_ms": others.to_json(),
            "ratio": {"best": best, "median": median},
        }));
    }
}

fn round(ratio: f64) -> f64 {
    (ratio * 100.0).round() / 100.0
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
        let round = |ms: f64| (ms * 10.0).round() / 10.0;
        json!({"best": round(self.best()), "median": round(self.median())})
    }
}
