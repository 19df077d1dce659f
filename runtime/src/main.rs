//! kata-runtime: the host's tool. Its commands, options and output are those of Kata Containers' tool, as far
//! as what they speak of exists here.

mod absent;
mod check;
mod config;
mod cp;
mod env;
mod exec;
mod factory;
mod host_command;
mod install;
mod lines;
mod list;
mod metrics;
mod pages;
mod session;
mod signals;
mod stats;
mod streams;
mod table;
mod terminal;
mod version;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

/// The host's tool of a container runtime that runs every pod in a virtual machine of its own.
#[derive(Parser)]
#[command(name = "kata-runtime", disable_version_flag = true)]
struct Cli {
    /// Configuration file, instead of the first one that is found
    #[arg(long, alias = "kata-config", global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Show the configuration files that are tried, in this order
    #[arg(long, alias = "kata-show-default-config-paths")]
    show_default_config_paths: bool,
    /// Show the version
    #[arg(short, long)]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Test whether this system can run containers in virtual machines; exit code 0 if so, otherwise 1
    #[command(alias = "kata-check")]
    Check(CheckArgs),
    /// Look at configuration files
    #[command(subcommand)]
    Config(Config),
    /// Show the effective settings, as TOML
    #[command(alias = "kata-env")]
    Env {
        /// Show them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Copy files between this host and a container of a pod, as `docker cp` does; the container needs no program for it
    Cp(cp::Options),
    /// Run a command of this host in a machine of its own, with the host's files to read and no network. The exit code is
    /// the command's, or 125 if it does not come about
    Do(host_command::Options),
    /// Run a command in a pod's guest, or a shell; it ends with this program. The exit code is the command's, or 125 if it
    /// does not come about
    Exec(exec::Options),
    /// Make, look for or remove the template from which machines start
    #[command(subcommand)]
    Factory(Factory),
    /// List the pods of this host, with the memory that they cost it
    #[command(visible_alias = "ps")]
    List {
        /// Show them as JSON
        #[arg(long)]
        json: bool,
        /// Do not cut ids
        #[arg(long)]
        no_trunc: bool,
    },
    /// Show what containers use, by their guests' cgroups
    Stats {
        /// The pod, by its id or the beginning of it; all without
        pod: Option<String>,
        /// Show it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a pod's metrics, in the text format of Prometheus
    Metrics {
        /// The pod, by its id or the beginning of it
        pod: String,
    },
    /// Show the lines of a pod in its shim's log, with enable_debug the guest's console among them
    Logs {
        /// The pod, by its id or the beginning of it
        pod: String,
        /// Show the last lines of the guest's console instead
        #[arg(long, conflicts_with = "follow")]
        console: bool,
        /// Go on until the pod ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Show what a pod has told containerd
    Events {
        /// The pod, by its id or the beginning of it
        pod: String,
        /// Go on until the pod ends
        #[arg(short, long)]
        follow: bool,
        /// Show each as a line of JSON
        #[arg(long)]
        json: bool,
    },
    /// Make this host's containerd, Docker and CRI-O know the runtime, and link the programs to /usr/local/bin
    Install(install::Options),
    /// Take out what `install` has put in; files are then as they were before
    Uninstall(install::Options),
    /// Write manual pages and completions for shells, for who packs this
    #[command(hide = true)]
    Pages {
        /// The directory `share` of the installation
        share: PathBuf,
    },
    /// Of Kata Containers' tool; says why it is not here
    #[command(hide = true)]
    Iptables(Anything),
    /// Of Kata Containers' tool; says why it is not here
    #[command(hide = true)]
    DirectVolume(Anything),
    /// Show the version
    Version,
}

/// All that follows.
#[derive(Args)]
struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _words: Vec<String>,
}

#[derive(Subcommand)]
enum Config {
    /// Show what becomes of each key of a file, also of one of Kata Containers; exit code 0 if it would be accepted
    Check {
        /// The file; its drop-ins are not looked at
        file: PathBuf,
    },
    /// Write a file of Kata Containers as one of ours, with its values and comments
    Migrate {
        /// The file; it is left as it is, and the new one is the output
        file: PathBuf,
    },
}

#[derive(Subcommand)]
enum Factory {
    /// Make the template
    Init(Whose),
    /// Report whether it is there
    Status(Whose),
    /// Remove all templates
    Destroy,
}

#[derive(Args)]
struct Whose {
    /// Whose template it is about, with template_scope = "namespace": k8s.io/NAME for pods of the Kubernetes namespace
    /// NAME
    #[arg(long)]
    namespace: Option<String>,
}

#[derive(Args)]
struct CheckArgs {
    /// Show each detail as well
    #[arg(short, long)]
    verbose: bool,
    /// Show what was looked at as JSON
    #[arg(long)]
    json: bool,
    /// Accepted for compatibility: no check uses the network
    #[arg(short, long)]
    no_network_checks: bool,
    /// Accepted for compatibility: every check is strict
    #[arg(short, long)]
    strict: bool,
    // The following are options of Kata Containers' tool that ask a server for its releases.
    #[arg(long, hide = true)]
    check_version_only: bool,
    #[arg(long, hide = true)]
    only_list_releases: bool,
    #[arg(long, hide = true)]
    include_all_releases: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        // They write to standard output from other threads.
        Some(Command::Exec(options)) => exec::run(options).map_err(Error::from),
        Some(Command::Do(options)) => host_command::run(&options, cli.config.as_deref()).map_err(Error::from),
        Some(Command::Cp(options)) => cp::run(&options).map(|()| ExitCode::SUCCESS).map_err(Error::from),
        _ => run(cli).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error}");
        match &error {
            Error::Exec(error) => ExitCode::from(error.code()),
            Error::Do(error) => ExitCode::from(error.code()),
            _ => ExitCode::FAILURE,
        }
    })
}

/// Why a command failed, each with its whole message.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("kata-runtime check: {0} is not available: there are no releases to ask a server for")]
    Releases(&'static str),
    #[error(transparent)]
    Check(#[from] check::Error),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Env(#[from] env::Error),
    #[error(transparent)]
    Cp(#[from] cp::Error),
    #[error(transparent)]
    Do(#[from] host_command::Error),
    #[error(transparent)]
    Exec(#[from] exec::Error),
    #[error(transparent)]
    List(#[from] list::Error),
    #[error(transparent)]
    Lines(#[from] lines::Error),
    #[error(transparent)]
    Metrics(#[from] metrics::Error),
    #[error(transparent)]
    Stats(#[from] stats::Error),
    #[error("kata-runtime factory: {0}")]
    Factory(#[from] factory::Error),
    #[error(transparent)]
    Absent(#[from] absent::Error),
    #[error("kata-runtime pages: {0}")]
    Pages(#[from] pages::Error),
    #[error("kata-runtime: {0}")]
    Install(#[from] install::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

fn run(cli: Cli) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match cli.command {
        _ if cli.version => writeln!(out, "{}", version::text())?,
        _ if cli.show_default_config_paths => {
            for path in katana_config::search_path() {
                writeln!(out, "{}", path.display())?;
            }
        }
        Some(Command::Version) => writeln!(out, "{}", version::text())?,
        Some(Command::Env { json }) => writeln!(out, "{}", env::text(cli.config.as_deref(), json)?)?,
        Some(Command::Check(args)) => {
            args.refuse_releases()?;
            check::run(cli.config.as_deref(), args.verbose, args.json, &mut out)?;
        }
        Some(Command::Install(options)) => install::install(&options, &mut out)?,
        Some(Command::Uninstall(options)) => install::uninstall(&options, &mut out)?,
        Some(Command::Pages { share }) => pages::write(&Cli::command(), &share)?,
        Some(Command::Iptables(_)) => return Err(absent::Error::Iptables.into()),
        Some(Command::DirectVolume(_)) => return Err(absent::Error::DirectVolume.into()),
        Some(Command::Config(Config::Check { file })) => config::check(&file, &mut out)?,
        Some(Command::Config(Config::Migrate { file })) => config::migrate(&file, &mut out)?,
        Some(Command::Factory(command)) => {
            let config = cli.config.as_deref();
            let state = match command {
                Factory::Init(whose) => {
                    factory::init(config, whose.namespace.as_deref())?;
                    "initialized"
                }
                Factory::Destroy => {
                    factory::destroy(config)?;
                    "destroyed"
                }
                Factory::Status(whose) if factory::is_there(config, whose.namespace.as_deref())? => "is on",
                Factory::Status(_) => "is off",
            };
            writeln!(out, "vm factory {state}")?;
        }
        Some(Command::List { json, no_trunc }) => list::run(json, no_trunc, &mut out)?,
        Some(Command::Stats { pod, json }) => stats::run(pod.as_deref(), json, &mut out)?,
        Some(Command::Metrics { pod }) => metrics::run(&pod, &mut out)?,
        Some(Command::Logs { pod, console, follow }) => lines::logs(&pod, console, follow, &mut out)?,
        Some(Command::Events { pod, follow, json }) => lines::events(&pod, follow, json, &mut out)?,
        Some(Command::Cp(_) | Command::Do(_) | Command::Exec(_)) | None => {
            write!(out, "{}", Cli::command().render_help())?;
        }
    }
    Ok(())
}

/// Runs what speaks to shims.
fn block_on<T>(task: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(task))
}

impl CheckArgs {
    fn refuse_releases(&self) -> Result<(), Error> {
        let asked = [
            (self.check_version_only, "--check-version-only"),
            (self.only_list_releases, "--only-list-releases"),
            (self.include_all_releases, "--include-all-releases"),
        ];
        match asked.iter().find(|(asked, _)| *asked) {
            Some((_, option)) => Err(Error::Releases(option)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_of_kata_are_understood() {
        for line in [
            "kata-runtime kata-check --verbose --no-network-checks",
            "kata-runtime check -n -v --strict",
            "kata-runtime --config /a check",
            "kata-runtime kata-env --json",
            "kata-runtime --kata-config /a env",
            "kata-runtime --kata-show-default-config-paths",
            "kata-runtime --version",
            "kata-runtime -v",
            "kata-runtime factory init",
            "kata-runtime config check /a",
            "kata-runtime config migrate /a",
            "kata-runtime list --json",
            "kata-runtime ps",
            "kata-runtime do ls -l",
            "kata-runtime do --memory 512 --volume /a:/b -- ls",
            "kata-runtime exec abc",
            "kata-runtime exec -it abc sh -c ls -l",
            "kata-runtime exec abc -- ls --all",
            "kata-runtime exec -c web -w /tmp -e A=1 abc ls",
            "kata-runtime cp -a abc:/etc .",
            "kata-runtime cp - abc/web:/etc",
            "kata-runtime stats abc",
            "kata-runtime metrics abc",
            "kata-runtime logs -f abc",
            "kata-runtime logs --console abc",
            "kata-runtime events abc --follow --json",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        assert!(Cli::try_parse_from(["kata-runtime", "metrics"]).is_err());
    }

    #[test]
    fn what_does_not_exist_here_says_why() {
        for (line, expected) in [
            (
                "kata-runtime iptables get --sandbox-id a --v6",
                "kata-runtime iptables: the guest has no iptables program",
            ),
            (
                "kata-runtime direct-volume add --volume-path /a",
                "kata-runtime direct-volume: no volume is mounted",
            ),
        ] {
            let error = run(Cli::parse_from(line.split(' '))).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn asking_for_releases_is_refused() {
        let cli = Cli::parse_from(["kata-runtime", "check", "--check-version-only"]);
        let error = run(cli).unwrap_err().to_string();
        assert!(error.starts_with("kata-runtime check: --check-version-only is not available"), "{error}");
    }
}
