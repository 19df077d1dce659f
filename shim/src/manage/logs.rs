//! Lines of the shim's log; with `enable_debug` those of the guest's console are among them.

use super::answer::{Answer, recent};
use crate::host::logger;

/// The last lines, and with `follow` those that come.
pub fn answer(follow: bool) -> Answer {
    recent(logger::recent(), |line| line.to_string(), "text/plain; charset=utf-8", follow)
}
