//! A process in a guest, as `exec` and `cp` have it: its streams are FIFOs beside the shim's socket, and it ends with this
//! program.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use hyper::Method;
use katana_pods::Pod;
use katana_pods::request::LIMIT;
use katana_protocol::manage::exec::{Exec, Exit, Size};
use katana_protocol::manage::{self, Container, Status};

use crate::signals;
use crate::streams;

/// Why there is no process, or no more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such pod, or its shim refuses or does not answer.
    #[error(transparent)]
    Pod(#[from] katana_pods::Error),
    /// No container of the pod is meant.
    #[error("pod {0} has no container {1:?}")]
    NoContainer(String, String),
    /// None runs.
    #[error("no container of pod {0} runs")]
    NoneRuns(String),
    /// Several are.
    #[error("pod {0} has several containers, name one of them: {1}")]
    Several(String, String),
    /// This host refuses something.
    #[error("{0}: {1}")]
    Host(String, io::Error),
    /// This host refuses a stream.
    #[error(transparent)]
    Stream(#[from] streams::Error),
    /// The user does not want it any more.
    #[error("ended by {0}")]
    Signal(&'static str, u8),
}

impl Error {
    /// The exit code of a program that ends by this, if it has one of its own.
    pub fn code(&self) -> Option<u8> {
        match self {
            Self::Signal(_, number) => Some(128 + number),
            _ => None,
        }
    }
}

/// Finds a pod by its id or the beginning of it, and asks it for its containers.
pub async fn find(id: &str) -> Result<(Pod, Vec<Container>), Error> {
    let pod = katana_pods::find(id)?;
    let containers = pod.get::<manage::Pod>("/pod").await?.containers;
    Ok((pod, containers))
}

/// The container that is named by its Kubernetes name, or its id or the beginning of it; without a name the only one that
/// runs.
pub fn choose(pod: &str, containers: &[Container], name: Option<&str>) -> Result<String, Error> {
    let programs = || containers.iter().filter(|container| !container.sandbox);
    let Some(name) = name else {
        let running: Vec<_> = programs().filter(|one| one.status == Status::Running).collect();
        return match running[..] {
            [] => Err(Error::NoneRuns(pod.to_owned())),
            [one] => Ok(one.id.clone()),
            _ => Err(Error::Several(pod.to_owned(), names(&running))),
        };
    };
    if let Some(exact) = programs().find(|one| one.id == name || one.name.as_deref() == Some(name)) {
        return Ok(exact.id.clone());
    }
    let found: Vec<_> = programs().filter(|one| !name.is_empty() && one.id.starts_with(name)).collect();
    match found[..] {
        [] => Err(Error::NoContainer(pod.to_owned(), name.to_owned())),
        [one] => Ok(one.id.clone()),
        _ => Err(Error::Several(pod.to_owned(), names(&found))),
    }
}

fn names(containers: &[&Container]) -> String {
    let names: Vec<_> = containers.iter().map(|one| one.name.as_deref().unwrap_or(&one.id)).collect();
    names.join(", ")
}

/// One process, before and while it runs.
pub struct Session {
    pod: Pod,
    /// Its name on the shim's side.
    pub id: String,
    directory: PathBuf,
}

impl Session {
    /// Makes a place for its streams.
    pub fn open(pod: Pod) -> Result<Self, Error> {
        let mut random = [0; 8];
        let drawn = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut random));
        drawn.map_err(|e| Error::Host("/dev/urandom".into(), e))?;
        let id = format!("{:016x}", u64::from_ne_bytes(random));
        // It goes with the pod if this program is killed.
        let directory = pod.directory.join(format!("exec-{id}"));
        let made = DirBuilder::new().mode(0o700).create(&directory);
        made.map_err(|e| Error::Host(directory.display().to_string(), e))?;
        Ok(Self { pod, id, directory })
    }

    /// The directory for its streams.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Runs the process to its end; the answer is its exit code. It ends early by a signal to this program.
    pub async fn run(&self, exec: &Exec) -> Result<u8, Error> {
        let body = serde_json::to_vec(exec).map_err(|e| Error::Host("the request".into(), e.into()))?;
        let answer = async {
            let answer = self.pod.request(Method::POST, "/exec", body).await?;
            let text = self.pod.whole(answer).await?;
            let exit: Exit = serde_json::from_slice(&text)
                .map_err(|e| katana_pods::Error::Answer(self.pod.id.clone(), e.to_string()))?;
            Ok::<_, Error>(u8::try_from(exit.exit_status).unwrap_or(u8::MAX))
        };
        tokio::select! {
            answer = answer => answer,
            (name, number) = signals::ending() => Err(Error::Signal(name, number)),
        }
    }

    /// Tells the process that its terminal has this size. One that has not started or has ended needs it not.
    pub async fn resize(&self, size: Size) {
        let Ok(body) = serde_json::to_vec(&size) else { return };
        let path = format!("/exec/{}/resize", self.id);
        let asked = self.pod.request(Method::POST, &path, body);
        let _ = self.pod.within(LIMIT, asked).await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(id: &str, name: Option<&str>, status: Status) -> Container {
        let (id, name) = (id.to_owned(), name.map(str::to_owned));
        Container { id, name, image: None, sandbox: false, status, pid: 1, exit_status: None }
    }

    #[test]
    fn a_container_is_chosen_by_what_it_is_called() {
        let sandbox = Container { sandbox: true, ..container("aa", None, Status::Running) };
        let all = [
            sandbox,
            container("ab", Some("web"), Status::Running),
            container("ac", Some("db"), Status::Stopped),
        ];
        let chosen = |name| choose("p", &all, name).map_err(|e| e.to_string());
        assert_eq!(chosen(None).unwrap(), "ab");
        assert_eq!(chosen(Some("web")).unwrap(), "ab");
        assert_eq!(chosen(Some("ac")).unwrap(), "ac");
        assert_eq!(chosen(Some("a")).unwrap_err(), "pod p has several containers, name one of them: web, db");
        for none in ["aa", "x", ""] {
            assert_eq!(chosen(Some(none)).unwrap_err(), format!("pod p has no container {none:?}"));
        }
        assert_eq!(choose("p", &all[2..], None).unwrap_err().to_string(), "no container of pod p runs");
        let two = [container("ab", Some("web"), Status::Running), container("ac", None, Status::Running)];
        assert!(matches!(choose("p", &two, None), Err(Error::Several(_, names)) if names == "web, ac"));
    }
}
