//! `kata-runtime stats`: what the containers of pods use.

use std::collections::HashMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use katana_pods::Pod;
use katana_protocol::manage::{ContainerStats, Stats};
use serde::Serialize;

use crate::table;

/// Between the two looks by which the use of processors is known.
const PERIOD: Duration = Duration::from_secs(1);

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime stats: {0}")]
    Pods(#[from] katana_pods::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// A container, as `--json` shows it.
#[derive(Serialize)]
struct Row {
    pod: String,
    #[serde(flatten)]
    stats: ContainerStats,
    /// Of one processor, hundredths.
    cpu_percent: f64,
}

/// Shows one pod's containers, or those of all, as a table or as JSON.
pub fn run(id: Option<&str>, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let pods = match id {
        Some(id) => vec![katana_pods::find(id)?],
        None => katana_pods::all()?,
    };
    let (rows, errors) = crate::block_on(look_twice(&pods))?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &rows).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        let head = ["POD", "CONTAINER", "CPU", "MEMORY", "LIMIT", "PIDS", "READ", "WRITTEN"];
        let cells: Vec<_> = rows.iter().map(Row::cells).collect();
        table::write(out, head, &cells)?;
    }
    match (id, errors.into_iter().next()) {
        (Some(_), Some(error)) => Err(error.into()),
        (None, Some(error)) => {
            eprintln!("kata-runtime stats: {}", table::plain(&error.to_string()));
            Ok(())
        }
        (_, None) => Ok(()),
    }
}

async fn look_twice(pods: &[Pod]) -> (Vec<Row>, Vec<katana_pods::Error>) {
    let (first, begin) = (look(pods).await, Instant::now());
    tokio::time::sleep(PERIOD).await;
    let (second, passed) = (look(pods).await, begin.elapsed());
    let before: HashMap<_, _> = first
        .iter()
        .flatten()
        .flat_map(|(pod, stats)| {
            stats.containers.iter().map(move |one| ((*pod, one.id.as_str()), one.cpu_usec))
        })
        .collect();
    let (mut rows, mut errors) = (Vec::new(), Vec::new());
    for looked in second {
        match looked {
            Err(e) => errors.push(e),
            Ok((pod, stats)) => rows.extend(stats.containers.into_iter().map(|stats| {
                let used = before
                    .get(&(pod, stats.id.as_str()))
                    .map_or(0, |old| stats.cpu_usec.saturating_sub(*old));
                let cpu_percent = used as f64 / passed.as_micros().max(1) as f64 * 100.0;
                Row { pod: pod.to_owned(), stats, cpu_percent: (cpu_percent * 10.0).round() / 10.0 }
            })),
        }
    }
    (rows, errors)
}

async fn look(pods: &[Pod]) -> Vec<Result<(&str, Stats), katana_pods::Error>> {
    let asked = pods.iter().map(|pod| async { Ok((pod.id.as_str(), pod.get("/stats").await?)) });
    futures::future::join_all(asked).await
}

impl Row {
    fn cells(&self) -> [String; 8] {
        let short = |id: &str| table::plain(&id.chars().take(13).collect::<String>());
        let ContainerStats { id, memory, memory_limit, pids, read, written, .. } = &self.stats;
        [
            short(&self.pod),
            short(id),
            format!("{:.1}%", self.cpu_percent),
            table::bytes(*memory),
            memory_limit.map_or_else(|| "-".into(), table::bytes),
            pids.to_string(),
            table::bytes(*read),
            table::bytes(*written),
        ]
    }
}
