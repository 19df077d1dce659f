//! Answers on the management socket.

use std::convert::Infallible;
use std::future::ready;
use std::ops::Deref;

use futures::stream::{self, Stream, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use katana_protocol::manage::Failure;
use serde::Serialize;

use crate::error::{Error, Result, one_line};
use crate::host::recent::Recent;

/// An answer, whole or as it comes.
pub type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A whole text.
pub fn text(kind: &'static str, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// A text that comes in parts.
pub fn parts(kind: &'static str, parts: impl Stream<Item = Bytes> + Send + 'static) -> Answer {
    let frames = parts.map(|part| Ok(Frame::data(part)));
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// What is kept, as a text of lines, and with `follow` what comes from then on.
pub fn recent<T, R>(recent: R, line: fn(&T) -> String, kind: &'static str, follow: bool) -> Answer
where
    T: Clone + Send + 'static,
    R: Deref<Target = Recent<T>> + Send + Sync + 'static,
{
    let lines = move |items: Vec<T>| Bytes::from(items.iter().map(line).collect::<String>());
    let (kept, count) = recent.after(0);
    let kept = stream::once(ready(lines(kept)));
    if !follow {
        return parts(kind, kept);
    }
    let coming = stream::unfold((recent, count), move |(recent, count)| async move {
        let (items, count) = recent.next(count).await;
        Some((lines(items), (recent, count)))
    });
    parts(kind, kept.chain(coming))
}

/// A value.
pub fn json<T: Serialize>(value: &T) -> Result<Answer> {
    let bytes = serde_json::to_vec(value).map_err(|e| Error::Host(format!("an answer as JSON: {e}")))?;
    Ok(text("application/json", bytes))
}

/// Why there is none.
pub fn failure(error: &Error) -> Answer {
    let body = serde_json::to_vec(&Failure { error: one_line(&error.to_string()) }).unwrap_or_default();
    let mut answer = text("application/json", body);
    *answer.status_mut() = match error {
        Error::NotFound(_) => StatusCode::NOT_FOUND,
        Error::AlreadyExists(_) | Error::FailedPrecondition(_) => StatusCode::CONFLICT,
        Error::InvalidArgument(_) => StatusCode::BAD_REQUEST,
        Error::Unimplemented(_) => StatusCode::NOT_IMPLEMENTED,
        Error::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        Error::DeadlineExceeded(_) => StatusCode::GATEWAY_TIMEOUT,
        Error::Host(_) | Error::Agent { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    answer
}
