//! HTTP: which path is answered how.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use katana_pods::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::gather::Gatherer;

/// Connections at once; others wait.
const MOST_CONNECTIONS: usize = 64;
/// How long a client may take over the head of a request, and keep a connection without one.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may last. Clients connect again.
const CONNECTION_LIMIT: Duration = Duration::from_secs(300);
/// Longest head of a request, bytes.
const LONGEST_HEAD: usize = 16 * 1024;
/// Pause after a connection that could not be taken, for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

const INDEX: &str = "kata-monitor\n\n\
    /metrics              the metrics of all pods of this host, for Prometheus\n\
    /metrics?sandbox=ID   those of one pod, by its id or the beginning of it\n\
    /sandboxes            the ids of the pods\n";

type Answer = Response<Full<Bytes>>;

/// Serves for ever.
pub async fn serve(listener: &TcpListener, gatherer: Arc<Gatherer>) {
    let turns = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let gatherer = Arc::clone(&gatherer);
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(CONNECTION_LIMIT, connection(stream, gatherer)).await;
                    drop(turn);
                });
            }
            Err(error) => {
                log::debug!("accept: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, gatherer: Arc<Gatherer>) {
    let service = service_fn(move |request| {
        let gatherer = Arc::clone(&gatherer);
        async move { Ok::<_, Infallible>(route(&gatherer, &request).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).max_buf_size(LONGEST_HEAD);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        log::debug!("connection: {error}");
    }
}

async fn route(gatherer: &Gatherer, request: &Request<Incoming>) -> Answer {
    log::debug!("{} {}", request.method(), request.uri());
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match request.uri().path() {
        "/" => text(StatusCode::OK, INDEX),
        "/metrics" => match sandbox(request.uri().query()) {
            Some(id) => metrics(gatherer.one(id).await),
            None => metrics(gatherer.all().await),
        },
        "/sandboxes" => match katana_pods::all() {
            Ok(pods) => {
                text(StatusCode::OK, pods.iter().map(|pod| format!("{}\n", pod.id)).collect::<String>())
            }
            Err(error) => failure(&error),
        },
        _ => text(StatusCode::NOT_FOUND, "there is no such page\n"),
    }
}

/// The pod that a request names; ids are plain characters.
fn sandbox(query: Option<&str>) -> Option<&str> {
    query?.split('&').find_map(|pair| pair.strip_prefix("sandbox="))
}

fn metrics(metrics: Result<String, Error>) -> Answer {
    match metrics {
        Ok(metrics) => {
            let mut answer = text(StatusCode::OK, metrics);
            let kind = HeaderValue::from_static(katana_metrics::text::CONTENT_TYPE);
            answer.headers_mut().insert(CONTENT_TYPE, kind);
            answer
        }
        Err(error) => failure(&error),
    }
}

fn failure(error: &Error) -> Answer {
    let status = match error {
        Error::NotFound(_) => StatusCode::NOT_FOUND,
        Error::Ambiguous(..) => StatusCode::BAD_REQUEST,
        Error::Connect(..) | Error::Answer(..) | Error::Refused { .. } => StatusCode::BAD_GATEWAY,
        Error::Silent(..) => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    text(status, format!("{error}\n"))
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(head: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = async { serve(&listener, Arc::default()).await };
        let client = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::select! {
            () = server => unreachable!("it serves for ever"),
            answer = client => answer,
        }
    }

    #[tokio::test]
    async fn paths_are_answered() {
        let cases = [
            ("GET /", "200 OK", "/sandboxes"),
            ("GET /sandboxes", "200 OK", ""),
            ("GET /metrics", "200 OK", "kata_monitor_running_shim_count "),
            ("GET /metrics?a=b&sandbox=no-such-pod", "404 Not Found", "no pod has an id that begins with"),
            ("GET /else", "404 Not Found", "no such page"),
            ("POST /metrics", "405 Method Not Allowed", "allow: GET, HEAD"),
        ];
        for (head, status, part) in cases {
            let answer = ask(head).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head}: {answer}");
            assert!(answer.contains(part), "{head}: {answer}");
        }
        assert!(ask("GET /metrics").await.contains("content-type: text/plain; version=0.0.4"));
    }
}
