//! Where the time of a start goes: the shim says in its debug log when it has come how far.

use std::path::Path;
use std::time::{Duration, SystemTime};

use katana_tests::container::new_id;
use katana_tests::{BUSYBOX, Configuration, Containerd, Run, Scratch, environment};

use crate::chart::Timeline;

/// What was reached, and how long after the start of `ctr`.
type Stage = (String, Duration);

/// Measures a start from a template and one that boots, prints tables, and draws them.
pub fn run(runtime: &str, directory: &Path) {
    for (name, template) in [("template", true), ("boot", false)] {
        let scratch = Scratch::new();
        let configuration = Configuration::installed()
            .set("factory.enable_template", template)
            .set("runtime.enable_debug", true);
        let configuration = scratch.file("configuration.toml", configuration.to_toml());
        // The first ones make the template, and bring all files into memory.
        (0..3).for_each(|_| drop(stages(runtime, &configuration)));
        let stages = stages(runtime, &configuration);
        println!("a start, {name}                      after ms   took ms");
        let mut timeline = Timeline::default();
        let mut before = Duration::ZERO;
        for (stage, at) in &stages {
            let took = at.saturating_sub(before);
            println!("  {stage:34} {:8.1}  {:8.1}", milliseconds(*at), milliseconds(took));
            timeline.stage(stage, milliseconds(before), milliseconds(*at));
            before = *at;
        }
        crate::write(&directory.join(format!("timeline-{name}.svg")), &timeline.svg());
    }
}

/// How long a machine takes from its VMM's spawning to its agent's first words, in a start with this configuration: one
/// without templates, and with the shim's debug log.
pub fn boot(runtime: &str, configuration: &Path) -> Duration {
    let stages = stages(runtime, configuration);
    let at = |name: &str| {
        let stage = stages.iter().find(|stage| stage.0 == name);
        stage.unwrap_or_else(|| panic!("the shim's log says nothing of \"{name}\"")).1
    };
    at("agent connected").saturating_sub(at("network looked at"))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn stages(runtime: &str, configuration: &Path) -> Vec<Stage> {
    let id = new_id();
    let start = SystemTime::now();
    Run::new(BUSYBOX).id(&id).runtime(runtime).configuration(configuration).command(&["true"]).output().ok();
    let end = SystemTime::now();
    // The log is written by containerd, from a pipe.
    std::thread::sleep(Duration::from_millis(500));
    let log = std::fs::read(Containerd::current().log()).expect("containerd's log");
    let log = String::from_utf8_lossy(&log);
    let ours = log.lines().filter(|line| line.ends_with(&format!("sandbox={id}")));
    let since = |time: SystemTime| environment::counted(time.duration_since(start).unwrap_or_default());
    let mut stages: Vec<Stage> =
        ours.filter_map(|line| parse(line).map(|(what, at)| (what, since(at)))).collect();
    stages.push(("ctr run ended".to_owned(), since(end)));
    stages.sort_by_key(|stage| stage.1);
    stages
}

/// `time="2026-01-02T03:04:05.678901234Z" level=debug msg="timeline: WHAT" ...`; all of a run are of one day.
fn parse(line: &str) -> Option<(String, SystemTime)> {
    let (_, what) = line.split_once("msg=\"timeline: ")?;
    let what = what.split('"').next()?.to_owned();
    let (_, time) = line.split_once('T')?;
    let mut parts = time.split('Z').next()?.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    let seconds = next()? * 3600.0 + next()? * 60.0 + next()?;
    let today = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs() / 86400 * 86400;
    Some((what, SystemTime::UNIX_EPOCH + Duration::from_secs(today) + Duration::from_secs_f64(seconds)))
}
