//! Lines of the shim's log, and the guest's console.

use std::time::Duration;

use super::answer::{Answer, recent, text};
use crate::error::{Error, Result, plain};
use crate::host::logger;
use crate::pod::Pod;

const PLAIN: &str = "text/plain; charset=utf-8";
/// How long the VMM may take to show the console.
const LIMIT: Duration = Duration::from_secs(1);

/// The last lines, and with `follow` those that come. With `enable_debug` the guest's console is among them.
pub fn answer(follow: bool) -> Answer {
    recent(logger::recent(), |line| line.to_string(), PLAIN, follow)
}

/// The last lines of the guest's console.
pub async fn console(pod: &Pod) -> Result<Answer> {
    let machine = pod.launched().borrow().clone();
    let machine = machine.ok_or_else(|| Error::Unavailable(format!("pod {} has no machine", pod.id())))?;
    let lines = tokio::time::timeout(LIMIT, machine.console())
        .await
        .map_err(|_| Error::DeadlineExceeded(format!("the VMM of pod {} does not answer", pod.id())))??;
    Ok(text(PLAIN, lines.lines().map(|line| plain(line) + "\n").collect::<String>()))
}
