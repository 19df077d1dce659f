//! How long starts take, with Katana from its template, with Katana booting, with runc and with its other peers, in
//! turns.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use katana_tests::cri::Pod;
use katana_tests::environment::{self, RUNC};
use katana_tests::{BUSYBOX, Configuration, Run, Scratch};
use serde_json::{Value, json};

use crate::chart::Chart;
use crate::peers::{MicroVm, Runsc, Skipped};
use crate::timeline;

const ROUNDS: usize = 20;
/// Where the clock counts instructions, and runs repeat.
const COUNTED_ROUNDS: usize = 7;
/// Of what takes longer.
const FEW_ROUNDS: usize = 5;
/// Containers that are started at once.
const AT_ONCE: [usize; 3] = [1, 10, 30];

/// Debian's has no network on Linux 6.11 and newer (gVisor's issue 10704), and a pod's containers need one.
const NO_RUNSC_PODS: &str = "no pods without a network";

/// Who starts containers: a runtime with options of `ctr run`, for Katana with a configuration.
struct Subject {
    name: &'static str,
    runtime: String,
    options: String,
    configuration: Option<PathBuf>,
}

impl Subject {
    fn run(&self, words: &[&str]) -> Run {
        let run = Run::new(BUSYBOX).runtime(&self.runtime).options(&self.options).command(words);
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
    let subject = |name, runtime: &str, options, configuration| Subject {
        name,
        runtime: runtime.to_owned(),
        options,
        configuration,
    };
    let runc = subject("runc", RUNC, String::new(), None);
    let kata = subject("kata", runtime, String::new(), None);
    let cold = subject("kata, booting", runtime, String::new(), Some(cold));
    let runsc = Runsc::find().map(|runsc| subject("runsc", RUNC, runsc.options(), None));

    let rounds = if environment::is_counted() { COUNTED_ROUNDS } else { ROUNDS };
    let with_runsc = |subjects: &[_]| subjects.iter().copied().chain(runsc.as_ref().ok()).collect::<Vec<_>>();
    let runs = measure(rounds, &with_runsc(&[&runc, &kata, &cold]), |subject| {
        subject.run(&["true"]).output().ok().elapsed
    });
    let execs = {
        let subjects = with_runsc(&[&runc, &kata]);
        let containers: Vec<_> =
            subjects.iter().map(|subject| subject.run(&["sleep", "10000"]).start()).collect();
        measure(rounds, &containers, |container| container.exec(&["true"]).ok().elapsed)
    };
    let pods = measure(FEW_ROUNDS, &["runc", "kata"], |handler| {
        let start = Instant::now();
        let pod = Pod::run(handler);
        let container = pod.start(json!({"command": ["sleep", "10000"]}));
        let elapsed = start.elapsed();
        drop((container, pod));
        elapsed
    });

    let of_runsc =
        |times: &[Times]| runsc.as_ref().map(|_| times[times.len() - 1].clone()).map_err(Clone::clone);
    let no_pods = runsc.as_ref().map_or_else(Clone::clone, |_| NO_RUNSC_PODS.to_owned());
    let mut table = Table { chart, rows: Vec::new() };
    table.row("ctr run --rm busybox true", &runs[0], (kata.name, &runs[1]), &of_runsc(&runs));
    table.row("the same, without a template", &runs[0], (cold.name, &runs[2]), &of_runsc(&runs));
    table.row("exec true", &execs[0], (kata.name, &execs[1]), &of_runsc(&execs));
    table.row("pod with a container, to running", &pods[0], (kata.name, &pods[1]), &Err(no_pods));
    for count in at_once() {
        let times: Vec<_> = with_runsc(&[&runc, &kata])
            .iter()
            .map(|subject| Times(vec![starts_at_once(subject, count)]))
            .collect();
        table.row(&format!("{count} at once, each"), &times[0], (kata.name, &times[1]), &of_runsc(&times));
    }
    let rows = table.rows;
    let ratio = |of: fn(&Times) -> f64| round(of(&runs[1]) / of(&runs[0]));
    json!({
        "runc_ms": runs[0].to_json(),
        "kata_ms": runs[1].to_json(),
        "kata_cold_ms": runs[2].to_json(),
        "runsc": outcome(&of_runsc(&runs)),
        "ratio": {"best": ratio(Times::best), "median": ratio(Times::median)},
        "rows": rows,
        "boot": boots(runtime, chart),
    })
}

/// The guest's kernel with nothing around it: in QEMU's microvm until it misses its root, with Katana until its agent
/// answers.
fn boots(runtime: &str, chart: &mut Chart) -> Value {
    let title = "the guest's boot alone";
    let machine = match MicroVm::find() {
        Ok(machine) => machine,
        Err(reason) => {
            println!("{title}: QEMU microvm skipped: {reason}");
            chart.note(&format!("{title}: QEMU microvm skipped: {reason}"));
            return json!({"qemu_microvm": outcome(&Err(reason))});
        }
    };
    let scratch = Scratch::new();
    let logging =
        Configuration::installed().set("factory.enable_template", false).set("runtime.enable_debug", true);
    let logging = scratch.file("configuration.toml", logging.to_toml());
    let times = measure(FEW_ROUNDS, &[true, false], |is_kata| {
        if *is_kata { timeline::boot(runtime, &logging) } else { machine.boot() }
    });
    println!("{title}, ms, best and median");
    for (name, times) in ["kata, to its agent", "QEMU microvm, to the missing root"].iter().zip(&times) {
        println!("  {name:34} {:7.1} {:7.1}", times.best(), times.median());
    }
    let bars = [("QEMU microvm", times[1].median()), ("kata", times[0].median())];
    chart.group(&format!("{title}, ms"), &bars);
    json!({"kata_ms": times[0].to_json(), "qemu_microvm": outcome(&Ok(times[1].clone()))})
}

/// A peer's figures, or why there are none.
fn outcome(times: &Result<Times, Skipped>) -> Value {
    match times {
        Ok(times) => json!({"ms": times.to_json()}),
        Err(reason) => json!({"skipped": reason}),
    }
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
            times.0.push(environment::counted(what(subject)));
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
    environment::counted(start.elapsed()) / u32::try_from(count).expect("a small number")
}

struct Table<'a> {
    chart: &'a mut Chart,
    rows: Vec<Value>,
}

impl Table<'_> {
    fn row(
        &mut self,
        what: &str,
        runc: &Times,
        (name, kata): (&str, &Times),
        runsc: &Result<Times, Skipped>,
    ) {
        if self.rows.is_empty() {
            println!(
                "times in ms, best and median              runc             kata          ratio            runsc"
            );
        }
        let (best, median) = (round(kata.best() / runc.best()), round(kata.median() / runc.median()));
        let of_runsc = match runsc {
            Ok(times) => format!("{:7.1} {:7.1}", times.best(), times.median()),
            Err(reason) => format!("skipped: {reason}"),
        };
        println!(
            "  {what:34} {:7.1} {:7.1}  {:7.1} {:7.1}  {best:5.2} {median:5.2}  {of_runsc}",
            runc.best(),
            runc.median(),
            kata.best(),
            kata.median()
        );
        let mut bars = vec![("runc", runc.median()), (name, kata.median())];
        bars.extend(runsc.as_ref().ok().map(|times| ("runsc", times.median())));
        self.chart.group(&format!("{what}, ms"), &bars);
        if let Err(reason) = runsc {
            self.chart.note(&format!("runsc skipped: {reason}"));
        }
        self.rows.push(json!({
            "name": what, "runc_ms": runc.to_json(), "kata_ms": kata.to_json(),
            "ratio": {"best": best, "median": median}, "runsc": outcome(runsc),
        }));
    }
}

fn round(ratio: f64) -> f64 {
    (ratio * 100.0).round() / 100.0
}

/// In order.
#[derive(Clone)]
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
