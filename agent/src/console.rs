//! Log lines to standard error, which is the guest's console.

use log::{LevelFilter, Log, Metadata, Record};

use crate::start_error::StartError;

struct Console;

impl Log for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // One write for the line: lines of the agent and of the kernel do not mix.
            let line = format!("kata-agent: {}: {}\n", record.level(), record.args());
            let _ = nix::unistd::write(std::io::stderr(), line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends log lines up to `level` to standard error.
pub fn start(level: LevelFilter) -> Result<(), StartError> {
    log::set_logger(&Console).map_err(|e| StartError::new("start the log", &e))?;
    log::set_max_level(level);
    Ok(())
}

/// The level that the kernel command line asks for (`agent.log=debug`). Warnings only otherwise: each byte on the
/// console costs an exit from the guest.
pub fn level(command_line: &str) -> LevelFilter {
    let asked = command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix("agent.log="));
    asked.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::Warn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_sets_the_level() {
        assert_eq!(level("console=hvc0 agent.log=debug quiet"), LevelFilter::Debug);
        assert_eq!(level("console=hvc0"), LevelFilter::Warn);
        assert_eq!(level("agent.log=loud"), LevelFilter::Warn);
    }
}
