//! The host's kernel: that it has every system call without which no container starts. Tried, not concluded from its
//! version: some kernels have calls of later ones, and a container's seccomp profile can take away what is there.

use katana_protocol::kernel::{CALLS, Call, OLDEST};

/// What is missing.
#[derive(Debug, thiserror::Error)]
#[error("this host's kernel lacks {}; Linux {OLDEST} or newer is needed", list(.0))]
pub(crate) struct Error(Vec<Call>);

fn list(calls: &[Call]) -> String {
    let one = |call: &Call| format!("{}(2), needed for {} (Linux {})", call.name, call.purpose, call.since);
    calls.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Tries all of them.
pub(crate) fn check(note: &dyn Fn(String)) -> Result<String, Error> {
    let version = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let found = format!("Linux {}; the oldest that is supported is {OLDEST}", version.trim());
    note(format!("kernel: {found}"));
    let (there, missing): (Vec<_>, Vec<_>) = CALLS.into_iter().partition(Call::is_there);
    for call in there {
        note(format!("{}(2): available", call.name));
    }
    if missing.is_empty() { Ok(found) } else { Err(Error(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc;

    mod without {
        use super::libc;
        include!("../../../protocol/src/kernel/without.rs");
    }

    #[test]
    fn each_missing_call_is_named_with_the_version_that_has_it() {
        assert!(check(&|_| {}).is_ok());
        let error = || check(&|_| {}).unwrap_err().to_string();
        assert_eq!(
            without::without("mount_setattr", error),
            "this host's kernel lacks mount_setattr(2), needed for read-only volumes (Linux 5.12); Linux 5.15 or newer is needed"
        );
        let both = || without::without("open_tree", error);
        let error = without::without("openat2", both);
        assert!(error.contains("open_tree(2), needed for volumes (Linux 5.2), openat2(2)"), "{error}");
    }
}
