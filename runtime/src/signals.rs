//! Signals that end this program.

use tokio::signal::unix::{SignalKind, signal};

/// Waits for one; the answer is its name and number.
pub async fn ending() -> (&'static str, u8) {
    let wait = async |kind: SignalKind, name| {
        match signal(kind) {
            Ok(mut signal) => drop(signal.recv().await),
            // It ends the program without a word.
            Err(_) => std::future::pending().await,
        }
        (name, u8::try_from(kind.as_raw_value()).unwrap_or(0))
    };
    tokio::select! {
        ended = wait(SignalKind::interrupt(), "SIGINT") => ended,
        ended = wait(SignalKind::terminate(), "SIGTERM") => ended,
        ended = wait(SignalKind::hangup(), "SIGHUP") => ended,
    }
}
