//! The command line that containerd gives: flags in the manner of Go's `flag` package, then an action.

/// What the shim was asked to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// Log verbosely.
    pub debug: bool,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// containerd's main socket.
    pub address: String,
    /// The binary that publishes events for shims without ttrpc; not used.
    pub publish_binary: String,
    /// The bundle, when it is not the working directory.
    pub bundle: String,
    /// The socket to serve (action `serve`).
    pub socket: String,
    /// The configuration that runtime options name (action `serve`).
    pub config: String,
    /// Print the version.
    pub version: bool,
    /// Print what this runtime is, as protobuf.
    pub info: bool,
    /// `start`, `delete` or `serve`.
    pub action: String,
}

impl Args {
    /// Parses the arguments behind the program's name.
    ///
    /// # Errors
    /// A text for the user, in the words of Go's `flag` package.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let name = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
            match name {
                Some("") if argument == "--" => {
                    parsed.action = arguments.next().unwrap_or_default();
                    break;
                }
                Some("") | None => {
                    parsed.action = argument;
                    break;
                }
                Some(name) => parsed.flag(name, &mut arguments)?,
            }
        }
        Ok(parsed)
    }

    fn flag(&mut self, flag: &str, rest: &mut impl Iterator<Item = String>) -> Result<(), String> {
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let boolean = match name {
            "debug" => Some(&mut self.debug),
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        };
        if let Some(target) = boolean {
            *target = match value.as_deref() {
                None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => true,
                Some("false" | "0" | "f" | "F" | "FALSE" | "False") => false,
                Some(other) => return Err(format!("invalid boolean value {other:?} for -{name}")),
            };
            return Ok(());
        }
        let target = match name {
            "namespace" => &mut self.namespace,
            "id" => &mut self.id,
            "address" => &mut self.address,
            "publish-binary" => &mut self.publish_binary,
            "bundle" => &mut self.bundle,
            "socket" => &mut self.socket,
            "config" => &mut self.config,
            _ => return Err(format!("flag provided but not defined: -{name}")),
        };
        *target = value.or_else(|| rest.next()).ok_or_else(|| format!("flag needs an argument: -{name}"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_command_lines_of_containerd() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd \
             -id abc -debug start",
        )
        .unwrap();
        assert_eq!(
            (start.namespace.as_str(), start.id.as_str(), start.action.as_str()),
            ("k8s.io", "abc", "start")
        );
        assert!(start.debug && !start.version);
        let delete = parse("--id=abc --bundle=/b -debug=false delete extra").unwrap();
        assert_eq!((delete.bundle.as_str(), delete.action.as_str(), delete.debug), ("/b", "delete", false));
        assert!(
            parse("-v").unwrap().version
                && parse("--version").unwrap().version
                && parse("-info").unwrap().info
        );
        assert_eq!(
            parse("-id -x -- start").unwrap(),
            Args { id: "-x".into(), action: "start".into(), ..Args::default() }
        );
    }

    #[test]
    fn wrong_flags_are_named() {
        assert_eq!(parse("-nope start").unwrap_err(), "flag provided but not defined: -nope");
        assert_eq!(parse("-id").unwrap_err(), "flag needs an argument: -id");
        assert_eq!(parse("-debug=maybe").unwrap_err(), "invalid boolean value \"maybe\" for -debug");
    }
}
