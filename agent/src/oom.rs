//! Kills for lack of memory, as a cgroup counts them.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc::UnboundedSender;

use crate::cgroup::{self, Cgroup};

/// Counts the out-of-memory kills in a cgroup and reports new ones.
#[derive(Debug)]
pub struct OomCounter {
    id: String,
    file: PathBuf,
    reported: AtomicU64,
    ooms: UnboundedSender<String>,
}

impl OomCounter {
    /// None so far.
    pub fn new(id: &str, cgroup: &Cgroup, ooms: &UnboundedSender<String>) -> Self {
        let file = cgroup.path().join("memory.events");
        Self { id: id.to_owned(), file, reported: AtomicU64::new(0), ooms: ooms.clone() }
    }

    /// Reports if there were kills since the last check.
    pub fn check(&self) {
        let kills = fs::read_to_string(&self.file)
            .ok()
            .and_then(|text| cgroup::parse_events(&text).get("oom_kill").copied());
        if kills.is_some_and(|kills| self.reported.fetch_max(kills, Ordering::Relaxed) < kills) {
            let _ = self.ooms.send(self.id.clone());
        }
    }

    /// Checks at each change, for as long as the cgroup is there.
    pub async fn watch(self: Arc<Self>, cgroup: Arc<Cgroup>) {
        let Ok(events) = cgroup.watch("memory.events") else { return };
        while events.read("oom_kill").is_ok() {
            self.check();
            if events.changed().await.is_err() {
                return;
            }
        }
    }
}
