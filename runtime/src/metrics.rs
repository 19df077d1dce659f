//! `kata-runtime metrics`: what a pod's shim tells Prometheus.

use std::io::{self, Write};

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime metrics: {0}")]
    Pods(#[from] katana_pods::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Shows the text as it comes: in it, what a guest says is escaped.
pub fn run(id: &str, out: &mut dyn Write) -> Result<(), Error> {
    let pod = katana_pods::find(id)?;
    let text = crate::block_on(pod.text("/metrics"))??;
    out.write_all(&text)?;
    Ok(())
}
