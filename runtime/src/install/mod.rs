//! `kata-runtime install` and `uninstall`: the programs' links, and the runtime "kata" in the configuration of
//! containerd, Docker and CRI-O.
//!
//! All is looked at first, and nothing is changed unless everything can be. Daemons are not restarted, unless that is
//! asked for: pods go on, but a kubelet may not like it at any time.

mod change;
mod containerd;
mod crio;
mod docker;
mod edit;
mod links;
mod restart;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use change::Change;
use katana_protocol::manage;
use restart::Daemon;

const CONTAINERD: &str = "etc/containerd/config.toml";
const DOCKER: &str = "etc/docker/daemon.json";
const CRIO: &str = "etc/crio/crio.conf.d/50-katana.conf";
/// k3s and RKE2 bring a containerd of their own.
const BUNDLED: [&str; 2] = [
    "var/lib/rancher/k3s/agent/etc/containerd/config.toml",
    "var/lib/rancher/rke2/agent/etc/containerd/config.toml",
];

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
    #[error(transparent)]
    Docker(#[from] docker::Error),
    #[error(transparent)]
    Crio(#[from] crio::Error),
    #[error(transparent)]
    Link(#[from] links::Error),
    #[error(transparent)]
    Change(#[from] change::Error),
    #[error("cannot tell where this program is: {0}")]
    Place(io::Error),
    #[error(transparent)]
    Restart(#[from] restart::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// What is asked for.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// containerd's configuration, whether it looks installed or not; with none of these options, all that is installed
    #[arg(long)]
    containerd: bool,
    /// A configuration file of a containerd, such as that of k3s: /var/lib/rancher/k3s/agent/etc/containerd/config.toml
    #[arg(long, value_name = "FILE")]
    containerd_config: Vec<PathBuf>,
    /// Docker's configuration
    #[arg(long)]
    docker: bool,
    /// CRI-O's configuration
    #[arg(long)]
    crio: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Have the daemons that are concerned and run read their configuration: systemctl restart, for Docker reload
    #[arg(long, conflicts_with = "dry_run")]
    restart: bool,
    /// The host's root directory, if it is not /
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    root: PathBuf,
}

/// What becomes of it all.
#[derive(Default)]
struct Plan {
    changes: Vec<Change>,
    notes: Vec<String>,
    daemons: Vec<Daemon>,
}

impl Plan {
    fn add(&mut self, changes: Vec<Change>, daemon: Daemon) {
        if !changes.is_empty() {
            self.changes.extend(changes);
            self.daemons.push(daemon);
        }
    }

    fn add_containerd(&mut self, plan: containerd::Plan, path: &Path) {
        self.notes.extend(plan.note);
        self.add(plan.changes, Daemon::of_containerd(path));
    }
}

/// Puts the runtime where it is missing.
pub(crate) fn install(options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let programs = programs(&options.root)?;
    let targets = Targets::of(options);
    let mut plan = Plan { changes: links::install(&options.root, &programs)?, ..Plan::default() };
    for path in &targets.containerd {
        plan.add_containerd(containerd::install(&options.root, path, new_version(options))?, path);
    }
    if let Some(path) = &targets.docker {
        plan.add(edit::add(path, &docker::Runtime { path })?, Daemon::DOCKER);
    }
    if let Some(path) = &targets.crio {
        plan.add(crio::install(path, &programs)?, Daemon::CRIO);
    }
    if targets.is_empty() {
        plan.notes.push(
            "no containerd, Docker or CRI-O is installed here: --containerd, --docker and --crio write their files all \
             the same"
                .to_owned(),
        );
    }
    finish(&plan, options, out)
}

/// Takes the runtime out of all files into which `install` has put it.
pub(crate) fn uninstall(options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let programs = programs(&options.root)?;
    let targets = Targets::of(options);
    let mut plan = Plan::default();
    for path in &targets.containerd {
        plan.add_containerd(containerd::uninstall(&options.root, path)?, path);
    }
    if let Some(path) = &targets.docker {
        plan.add(edit::remove(path, &docker::Runtime { path })?, Daemon::DOCKER);
    }
    if let Some(path) = &targets.crio {
        plan.add(crio::uninstall(path)?, Daemon::CRIO);
    }
    let links = links::uninstall(&options.root, &programs);
    if links.is_empty() {
        // There is nothing to say of them.
    } else if pods_run(&options.root) {
        plan.notes.push(
            "pods run: the links to the programs stay, containerd needs the shim for their end".to_owned(),
        );
    } else if targets.all {
        plan.changes.extend(links);
    } else {
        plan.notes.push(
            "the links to the programs stay, others may need them; uninstall without options removes them"
                .to_owned(),
        );
    }
    finish(&plan, options, out)
}

fn finish(plan: &Plan, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    for note in &plan.notes {
        writeln!(out, "note: {note}")?;
    }
    if plan.changes.is_empty() {
        writeln!(out, "nothing to change")?;
        return Ok(());
    }
    if options.dry_run {
        for change in &plan.changes {
            write!(out, "{}", change.difference())?;
        }
        return Ok(());
    }
    change::apply(&plan.changes)?;
    for change in &plan.changes {
        writeln!(out, "{}", change.summary())?;
    }
    for daemon in &plan.daemons {
        if options.restart {
            daemon.restart(out)?;
        } else {
            writeln!(out, "{}", daemon.advice())?;
        }
    }
    Ok(())
}

/// The configuration files that are meant.
struct Targets {
    containerd: Vec<PathBuf>,
    docker: Option<PathBuf>,
    crio: Option<PathBuf>,
    /// None was chosen by name.
    all: bool,
}

impl Targets {
    fn of(options: &Options) -> Self {
        let Options { containerd, containerd_config, docker, crio, root, .. } = options;
        let all = !(*containerd || *docker || *crio) && containerd_config.is_empty();
        let is_installed = |directory: &str, program: &str| {
            let programs = ["usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin"];
            root.join(directory).is_dir()
                || programs.iter().any(|place| root.join(place).join(program).exists())
        };
        let wanted = |asked: bool, directory, program, file: &str| {
            (asked || all && is_installed(directory, program)).then(|| root.join(file))
        };
        let mut files: Vec<_> =
            wanted(*containerd, "etc/containerd", "containerd", CONTAINERD).into_iter().collect();
        if all {
            files.extend(BUNDLED.iter().map(|file| root.join(file)).filter(|file| file.exists()));
        }
        files.extend(containerd_config.iter().map(|file| root.join(file.strip_prefix("/").unwrap_or(file))));
        Self {
            containerd: files,
            docker: wanted(*docker, "etc/docker", "dockerd", DOCKER),
            crio: wanted(*crio, "etc/crio", "crio", CRIO),
            all,
        }
    }

    fn is_empty(&self) -> bool {
        self.containerd.is_empty() && self.docker.is_none() && self.crio.is_none()
    }
}

fn pods_run(root: &Path) -> bool {
    let pods = std::fs::read_dir(root.join(manage::RUN.trim_start_matches('/')).join(manage::SANDBOXES));
    pods.is_ok_and(|mut pods| pods.next().is_some())
}

/// The directory of this program and of those beside it, as the host names it.
fn programs(root: &Path) -> Result<PathBuf, Error> {
    let program = std::env::current_exe().map_err(Error::Place)?;
    let directory = program.parent().ok_or_else(|| Error::Place(io::ErrorKind::NotFound.into()))?;
    Ok(directory.strip_prefix(root).map_or_else(|_| directory.to_owned(), |inner| Path::new("/").join(inner)))
}

/// The version of a configuration of containerd that is to be made: one that the installed containerd reads. All read
/// version 2.
fn new_version(options: &Options) -> i64 {
    if options.root != Path::new("/") {
        return 2;
    }
    let output = std::process::Command::new("containerd").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    // containerd github.com/containerd/containerd/v2 v2.1.9 COMMIT
    let version =
        text.split_whitespace().nth(2).and_then(|word| word.trim_start_matches('v').split('.').next());
    if version.and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major >= 2) { 3 } else { 2 }
}

#[cfg(test)]
mod tests;
