//! Requests to a pod's shim.

use std::future::Future;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use katana_protocol::manage::{Failure, SOCKET};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::{Error, Pod};

/// How long a shim may take to answer what it knows itself.
pub const LIMIT: Duration = Duration::from_secs(3);
/// Longest answer, bytes.
const LONGEST: usize = 16 << 20;

impl Pod {
    /// What a path holds, as JSON.
    ///
    /// # Errors
    /// Those of [`Pod::text`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let text = self.text(path).await?;
        serde_json::from_slice(&text).map_err(|e| self.answer(e))
    }

    /// What a path holds.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Silent`] after [`LIMIT`], [`Error::Answer`] or [`Error::Refused`].
    pub async fn text(&self, path: &str) -> Result<Bytes, Error> {
        self.within(LIMIT, async { self.whole(self.request(Method::GET, path, Bytes::new()).await?).await })
            .await
    }

    /// Sends a request and waits for the head of the answer, however long that takes.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Answer`] or [`Error::Refused`].
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Result<Response<Incoming>, Error> {
        let socket = self.directory.join(SOCKET);
        let stream = UnixStream::connect(socket).await.map_err(|e| Error::Connect(self.id.clone(), e))?;
        let connected = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = connected.map_err(|e| self.answer(e))?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header(HOST, "localhost");
        let request = request.body(Full::new(body.into())).map_err(|e| self.answer(e))?;
        let answer = sender.send_request(request).await.map_err(|e| self.answer(e))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status().as_u16();
        let text = self.whole(answer).await?;
        let failure = serde_json::from_slice::<Failure>(&text);
        Err(Error::Refused { status, text: failure.map_or_else(|_| format!("status {status}"), |f| f.error) })
    }

    /// The whole body of an answer.
    ///
    /// # Errors
    /// [`Error::Answer`].
    pub async fn whole(&self, answer: Response<Incoming>) -> Result<Bytes, Error> {
        let body = Limited::new(answer.into_body(), LONGEST).collect().await;
        body.map(|body| body.to_bytes()).map_err(|e| self.answer(e))
    }

    /// Waits no longer than so.
    ///
    /// # Errors
    /// [`Error::Silent`], or those of what is waited for.
    pub async fn within<T>(
        &self,
        limit: Duration,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let late = |_| Error::Silent(self.id.clone(), limit.as_secs());
        timeout(limit, answer).await.map_err(late)?
    }

    fn answer(&self, why: impl std::fmt::Display) -> Error {
        Error::Answer(self.id.clone(), why.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Process;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// A pod whose shim answers so, or not at all.
    fn pod(name: &str, answer: Option<&'static str>) -> Pod {
        let directory = std::env::temp_dir().join(format!("katana-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let _ = std::fs::remove_file(directory.join(SOCKET));
        let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
        std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut head = [0; 1024];
            let _ = stream.read(&mut head);
            if let Some(answer) = answer {
                stream.write_all(answer.as_bytes()).unwrap();
            } else {
                std::thread::sleep(Duration::from_secs(600));
            }
        });
        let shim = Process { pid: 1, start: 1 };
        Pod { id: name.into(), namespace: "n".into(), shim, vmm: None, cgroup: None, directory }
    }

    #[tokio::test]
    async fn answers_and_refusals_are_told_apart() {
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n[1,2,3]";
        assert_eq!(pod("answers", Some(answer)).get::<Vec<u32>>("/x").await.unwrap(), [1, 2, 3]);
        let refusal = "HTTP/1.1 404 Not Found\r\ncontent-length: 13\r\n\r\n{\"error\":\"a\"}";
        let error = pod("refuses", Some(refusal)).text("/x").await.unwrap_err();
        assert!(matches!(&error, Error::Refused { status: 404, text } if text == "a"), "{error}");
        let error = pod("breaks", Some("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx")).text("/x").await;
        assert!(matches!(error, Err(Error::Answer(..))), "{error:?}");
        let mut gone = pod("gone", None);
        gone.directory.push("nowhere");
        assert!(matches!(gone.text("/x").await, Err(Error::Connect(..))));
    }

    #[tokio::test]
    async fn a_silent_shim_is_named() {
        let silent = pod("silent", None);
        let limit = Duration::from_millis(50);
        let answer = async { silent.request(Method::GET, "/x", Bytes::new()).await.map(drop) };
        let error = silent.within(limit, answer).await.unwrap_err();
        assert_eq!(error.to_string(), "the shim of pod silent does not answer within 0 s");
    }
}
