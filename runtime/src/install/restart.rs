//! The daemons that have to read their configuration again.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Why a daemon has not read its configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("all files are changed, but systemctl {verb} {unit} failed: {why}")]
    Failed { verb: &'static str, unit: &'static str, why: String },
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// A daemon: the units that it may run as, and what is to be asked of systemd.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Daemon {
    units: &'static [&'static str],
    verb: &'static str,
}

impl Daemon {
    /// A restart would end all of Docker's containers; reading its file again is enough for a new runtime.
    pub(crate) const DOCKER: Self = Self { units: &["docker"], verb: "reload" };
    pub(crate) const CRIO: Self = Self { units: &["crio"], verb: "restart" };

    /// The one that reads this file.
    pub(crate) fn of_containerd(path: &Path) -> Self {
        let inside = |name: &str| path.iter().any(|part| part == name);
        let units: &[_] = match () {
            () if inside("k3s") => &["k3s", "k3s-agent"],
            () if inside("rke2") => &["rke2-server", "rke2-agent"],
            () => &["containerd"],
        };
        Self { units, verb: "restart" }
    }

    /// What is left to be done by hand.
    pub(crate) fn advice(&self) -> String {
        format!("now: systemctl {} {}", self.verb, self.units.join(", or "))
    }

    /// Has those that run read their configuration.
    pub(crate) fn restart(&self, out: &mut dyn Write) -> Result<(), Error> {
        for unit in self.units {
            // One that has failed, too: an uninstallation may be what makes it come up again. What does not exist is inactive.
            let state = systemctl(&["show", "--property=ActiveState", "--value", unit]);
            if !matches!(state.as_deref().map(str::trim), Ok("inactive") | Err(_)) {
                let failed = |why| Error::Failed { verb: self.verb, unit, why };
                systemctl(&[self.verb, unit]).map_err(failed)?;
                writeln!(out, "systemctl {} {unit}: done", self.verb)?;
            }
        }
        Ok(())
    }
}

fn systemctl(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    match output {
        Err(e) => Err(format!("cannot run it: {e}")),
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}
