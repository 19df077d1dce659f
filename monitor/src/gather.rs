//! All pods are asked at once, each for so long as one may take. What a dead or silent shim costs is that time, once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use hyper::Method;
use hyper::body::Bytes;
use katana_pods::{Error, Pod};
use katana_protocol::manage;
use tokio::sync::Semaphore;

use crate::merge::{Labels, Merged};
use crate::own::Own;

/// How long a pod may take. Its shim gives its guest 0.7 s.
const LIMIT: Duration = Duration::from_secs(1);
/// Pods that are asked at once.
const AT_ONCE: usize = 64;
/// Longest text of a pod that is believed, bytes. That of a pod with few interfaces is some 40 KiB.
const LONGEST: usize = 1 << 20;

/// A pod's id and containerd's namespace.
type Key = (String, String);

/// Asks pods, one request after the other.
pub struct Gatherer {
    turn: Semaphore,
    own: Mutex<Own>,
    /// Namespace and name in Kubernetes, which a pod keeps for its life.
    names: Mutex<HashMap<Key, Option<(String, String)>>>,
}

impl Default for Gatherer {
    fn default() -> Self {
        Self { turn: Semaphore::new(1), own: Mutex::default(), names: Mutex::default() }
    }
}

impl Gatherer {
    /// The metrics of all pods, and this program's own.
    ///
    /// # Errors
    /// When the pods cannot be listed.
    pub async fn all(&self) -> Result<String, Error> {
        let _turn = self.turn.acquire().await;
        let begun = Instant::now();
        let pods = katana_pods::all()?;
        let asked = stream::iter(pods.clone()).map(|pod| async move { (key(&pod), self.ask(&pod).await) });
        let mut answers: HashMap<_, _> = asked.buffer_unordered(AT_ONCE).collect().await;
        self.forget(&pods);
        let (mut merged, mut up) = (Merged::default(), Vec::with_capacity(pods.len()));
        for pod in &pods {
            let answer = answers.remove(&key(pod));
            up.push((pod.id.as_str(), matches!(answer, Some(Ok(_)))));
            match answer {
                Some(Ok((text, mut labels))) => {
                    // Ids are unique within one namespace of one containerd.
                    if pods.iter().filter(|other| other.id == pod.id).count() > 1 {
                        labels.push(("containerd_namespace", pod.namespace.clone()));
                    }
                    merged.add(&text, &labels);
                }
                // It has only just come, or goes.
                Some(Err(error @ Error::Connect(..))) => log::debug!("{error}"),
                Some(Err(error)) => log::warn!("{error}"),
                None => {}
            }
        }
        let mut own = self.own();
        own.scraped(begun.elapsed(), up.iter().filter(|(_, answered)| !answered).count());
        Ok(own.text(&up) + &merged.finish())
    }

    /// The metrics of one pod as its shim tells them.
    ///
    /// # Errors
    /// When there is none, or its shim does not answer.
    pub async fn one(&self, id: &str) -> Result<String, Error> {
        let pod = katana_pods::find(id)?;
        pod.within(LIMIT, text(&pod)).await
    }

    async fn ask(&self, pod: &Pod) -> Result<(String, Labels), Error> {
        let asked = async {
            let text = text(pod).await?;
            let mut labels = vec![("sandbox_id", pod.id.clone())];
            if let Some((namespace, name)) = self.name(pod).await? {
                labels.extend([("cri_namespace", namespace), ("cri_name", name)]);
            }
            Ok((text, labels))
        };
        pod.within(LIMIT, asked).await
    }

    async fn name(&self, pod: &Pod) -> Result<Option<(String, String)>, Error> {
        if let Some(name) = self.names().get(&key(pod)) {
            return Ok(name.clone());
        }
        let described: manage::Pod = pod.get("/pod").await?;
        // Before it has a container, its name is not known.
        if !described.containers.is_empty() {
            self.names().insert(key(pod), described.kubernetes.clone());
        }
        Ok(described.kubernetes)
    }

    fn forget(&self, pods: &[Pod]) {
        let keys: Vec<_> = pods.iter().map(key).collect();
        self.names().retain(|known, _| keys.contains(known));
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self) -> MutexGuard<'_, HashMap<Key, Option<(String, String)>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(pod: &Pod) -> Key {
    (pod.id.clone(), pod.namespace.clone())
}

async fn text(pod: &Pod) -> Result<String, Error> {
    let answer = pod.request(Method::GET, "/metrics", Bytes::new()).await?;
    let text = pod.whole(answer).await?;
    let wrong = |why: &str| Error::Answer(pod.id.clone(), format!("its metrics are {why}"));
    if text.len() > LONGEST {
        return Err(wrong("too long"));
    }
    String::from_utf8(text.into()).map_err(|_| wrong("no text"))
}
