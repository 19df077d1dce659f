//! gRPC calls over containerd's socket. One connection a call: there is no state between calls, and a test that
//! restarts containerd needs no other client.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;

/// gRPC over HTTP/2: a byte for compression, four for the length.
const PREFIX: usize = 5;

/// The service, or the connection to it, is not there.
pub const UNAVAILABLE: i32 = 14;

/// What a server answered instead of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// gRPC's code: 5 is NotFound, and so on.
    pub code: i32,
    /// For the user.
    pub message: String,
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "gRPC code {}: {}", self.code, self.message)
    }
}

impl Status {
    /// The connection failed.
    fn connection(error: &dyn fmt::Display) -> Self {
        Self { code: UNAVAILABLE, message: format!("connection: {error}") }
    }
}

/// Calls a method, as `runtime.v1.RuntimeService/Version`.
pub fn call<Answer: Message>(
    socket: &Path,
    method: &str,
    request: &impl Message,
    limit: Duration,
) -> Result<Answer, Status> {
    let answers = call_in(None, socket, method, request, limit)?;
    answers.into_iter().next().ok_or_else(|| Status::connection(&"an answer without a message"))
}

/// The same in a namespace of containerd, for a method that may answer with several messages, or none.
pub fn call_in<Answer: Message>(
    namespace: Option<&str>,
    socket: &Path,
    method: &str,
    request: &impl Message,
    limit: Duration,
) -> Result<Vec<Answer>, Status> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Status::connection(&e))?;
    let body = request.write_to_bytes().map_err(|e| Status::connection(&e))?;
    let answer = runtime.block_on(async {
        let exchange = tokio::time::timeout(limit, exchange(socket, namespace, method, &body)).await;
        exchange.unwrap_or_else(|_| Err(Status::connection(&format!("no answer in {limit:?}"))))
    })?;
    messages(answer)?
        .iter()
        .map(|message| Answer::parse_from_bytes(message).map_err(|e| Status::connection(&e)))
        .collect()
}

/// The messages of a body.
fn messages(mut body: Bytes) -> Result<Vec<Bytes>, Status> {
    let mut messages = Vec::new();
    while !body.is_empty() {
        let length = body.get(1..PREFIX).and_then(|length| length.try_into().ok()).map(u32::from_be_bytes);
        let end = length.and_then(|length| PREFIX.checked_add(usize::try_from(length).ok()?));
        let end = end.filter(|end| *end <= body.len());
        let end = end.ok_or_else(|| Status::connection(&"a message that is cut off"))?;
        messages.push(body.split_to(end).slice(PREFIX..));
    }
    Ok(messages)
}

async fn exchange(
    socket: &Path,
    namespace: Option<&str>,
    method: &str,
    body: &[u8],
) -> Result<Bytes, Status> {
    let stream = UnixStream::connect(socket).await.map_err(|e| Status::connection(&e))?;
    let (client, connection) = h2::client::handshake(stream).await.map_err(|e| Status::connection(&e))?;
    let connection = tokio::spawn(connection);
    let answer = one_request(client, namespace, method, body).await;
    connection.abort();
    answer
}

async fn one_request(
    client: h2::client::SendRequest<Bytes>,
    namespace: Option<&str>,
    method: &str,
    body: &[u8],
) -> Result<Bytes, Status> {
    let failed = |e: h2::Error| Status::connection(&e);
    let request = Request::post(format!("http://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let request = match namespace {
        Some(namespace) => request.header("containerd-namespace", namespace),
        None => request,
    };
    let request = request.body(()).map_err(|e| Status::connection(&e))?;
    let (response, mut sender) =
        client.ready().await.map_err(failed)?.send_request(request, false).map_err(failed)?;
    let length = u32::try_from(body.len()).map_err(|e| Status::connection(&e))?;
    let mut message = BytesMut::from(&[0][..]);
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(body);
    sender.send_data(message.freeze(), true).map_err(failed)?;

    let response = response.await.map_err(failed)?;
    // An error without a message has its status where others have their first headers.
    status(response.headers())?;
    let mut stream = response.into_body();
    let mut answer = BytesMut::new();
    while let Some(part) = stream.data().await {
        let part = part.map_err(failed)?;
        stream.flow_control().release_capacity(part.len()).map_err(failed)?;
        answer.extend_from_slice(&part);
    }
    status(&stream.trailers().await.map_err(failed)?.unwrap_or_default())?;
    Ok(answer.freeze())
}

fn status(headers: &HeaderMap) -> Result<(), Status> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status").and_then(|code| code.parse().ok()) {
        None | Some(0) => Ok(()),
        Some(code) => Err(Status { code, message: decoded(text("grpc-message").unwrap_or_default()) }),
    }
}

/// gRPC's messages are percent-encoded.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((plain, encoded)) = rest.split_once('%') {
        bytes.extend_from_slice(plain.as_bytes());
        let value = encoded.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(value.unwrap_or(b'%'));
        rest = if value.is_some() { &encoded[2..] } else { encoded };
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_any_number_of_messages() {
        let body = |bytes: &'static [u8]| messages(Bytes::from_static(bytes));
        assert_eq!(body(b""), Ok(Vec::new()));
        assert_eq!(body(b"\0\0\0\0\x01a\0\0\0\0\0"), Ok(vec![Bytes::from("a"), Bytes::new()]));
        body(b"\0\0\0\0\x02a").unwrap_err();
        body(b"\0\0\0").unwrap_err();
    }

    #[test]
    fn messages_are_decoded() {
        assert_eq!(decoded("a%20b%0Ac"), "a b\nc");
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(decoded("%zz%41"), "%zzA");
    }
}
