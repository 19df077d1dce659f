//! The one error that ends the agent.

/// Why the guest cannot serve. One line for the console.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}: {reason}")]
pub struct StartError {
    doing: String,
    reason: String,
}

impl StartError {
    /// `doing` completes "cannot ...".
    pub fn new(doing: impl Into<String>, reason: &dyn std::fmt::Display) -> Self {
        Self { doing: doing.into(), reason: reason.to_string() }
    }
}
