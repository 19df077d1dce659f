//! The bundle of a command of the host: a specification over the host's root, read-only.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Options;

/// Where bundles are; a directory's name is the pid of the process that is its owner.
const BUNDLES: &str = "/run/kata-runtime";
/// File systems of the kernel or of the host's services, of which the machine has its own.
const NOT_SHOWN: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];
/// What of the caller's environment a command gets.
const ENVIRONMENT: [&str; 7] = ["PATH", "HOME", "TERM", "LANG", "LC_ALL", "TZ", "USER"];

/// A bundle; removed when it is dropped.
pub struct Bundle {
    pub path: PathBuf,
}

impl Bundle {
    /// Makes the directory, and removes those of processes that are gone.
    pub fn create(specification: &Value) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(BUNDLES)?;
        for entry in fs::read_dir(BUNDLES)?.flatten() {
            let owner = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = Path::new(BUNDLES).join(std::process::id().to_string());
        let bundle = Self { path };
        fs::DirBuilder::new().mode(0o700).create(&bundle.path)?;
        fs::write(bundle.path.join("config.json"), specification.to_string())?;
        Ok(bundle)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The specification for a command in this directory, on a host with these mounts (proc_pid_mountinfo(5)).
pub fn specification(options: &Options, directory: &Path, mountinfo: &str, terminal: bool) -> Value {
    let capabilities = json!(CAPABILITIES);
    let mut environment: Vec<_> =
        ENVIRONMENT.iter().filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?))).collect();
    environment.extend(options.environment.iter().cloned());
    let mut resources = json!({});
    if let Some(mib) = options.memory {
        resources["memory"] = json!({"limit": mib.saturating_mul(1 << 20)});
    }
    if let Some(cpus) = options.cpus {
        resources["cpu"] = json!({"quota": u64::from(cpus) * 100_000, "period": 100_000});
    }
    let own = |kind: &str, target: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    let mut mounts = vec![
        own("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        own("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        own("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        own(
            "devpts",
            "/dev/pts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        own("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777"]),
        own("tmpfs", "/run", &["nosuid", "nodev", "mode=755"]),
        own("tmpfs", "/tmp", &["nosuid", "nodev", "mode=1777"]),
    ];
    mounts.extend(shown(mountinfo, directory).into_iter().map(
        |path| json!({"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}),
    ));
    mounts.extend(options.volumes.iter().map(|volume| {
        let access = if volume.writable { "rw" } else { "ro" };
        json!({"destination": volume.target, "type": "bind", "source": volume.source, "options": ["rbind", access]})
    }));
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0},
            "args": options.command,
            "env": environment,
            "cwd": directory,
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        },
        "root": {"path": "/", "readonly": true},
        "hostname": "kata",
        "mounts": mounts,
        "linux": {"resources": resources, "namespaces": namespaces,
            "cgroupsPath": format!("/kata-runtime/{}", std::process::id())},
    })
}

/// Those of Docker's containers.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// The mounts of the host that are shown besides its root, outer ones first: those at the top, such as /home, and the one
/// that the directory is in.
fn shown(mountinfo: &str, directory: &Path) -> BTreeSet<PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let points: Vec<PathBuf> = points.filter(|point| point != Path::new("/")).collect();
    let hidden = |point: &Path| NOT_SHOWN.iter().any(|path| point.starts_with(path));
    let inner = points.iter().filter(|point| directory.starts_with(point));
    let inner = inner.max_by_key(|point| point.components().count());
    let at_top = points.iter().filter(|point| point.components().count() == 2);
    at_top.chain(inner).filter(|point| !hidden(point)).cloned().collect()
}

/// Blanks and the like are written as a backslash and three octal digits.
fn unescape(path: &str) -> PathBuf {
    let mut parts = path.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                bytes.extend_from_slice(&part.as_bytes()[3..]);
            }
            None => {
                bytes.push(b'\\');
                bytes.extend_from_slice(part.as_bytes());
            }
        }
    }
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_command::Volume;

    const MOUNTS: &str = "22 1 8:1 / / rw - ext4 /dev/a rw\n23 22 0:5 / /proc rw - proc proc rw\n\
        24 22 8:2 / /home rw - ext4 /dev/b rw\n25 22 0:6 / /run rw - tmpfs t rw\n26 25 0:7 / /run/x rw - tmpfs t rw\n\
        27 22 8:3 / /srv/my\\040data rw - xfs /dev/c rw\nshort line";

    #[test]
    fn file_systems_at_the_top_and_the_one_around_are_shown() {
        let of = |directory: &str| shown(MOUNTS, Path::new(directory)).into_iter().collect::<Vec<_>>();
        assert_eq!(of("/root"), [Path::new("/home")]);
        assert_eq!(of("/home/me"), [Path::new("/home")]);
        assert_eq!(of("/srv/my data/x"), [Path::new("/home"), Path::new("/srv/my data")]);
        assert_eq!(of("/run/x/y"), [Path::new("/home")]);
        assert_eq!(unescape("a\\"), Path::new("a\\"));
        assert_eq!(unescape("a\\999b\\134"), Path::new("a\\999b\\"));
    }

    #[test]
    fn a_command_gets_what_its_options_say() {
        let options = Options {
            command: vec!["ls".into(), "-l".into()],
            environment: vec!["A=b".into()],
            memory: Some(100),
            cpus: Some(2),
            volumes: vec![Volume { source: "/data".into(), target: "/mnt".into(), writable: true }],
        };
        let specification = specification(&options, Path::new("/root"), MOUNTS, true);
        assert_eq!(specification["process"]["args"], json!(["ls", "-l"]));
        assert_eq!(specification["process"]["cwd"], "/root");
        assert!(specification["process"]["env"].as_array().unwrap().contains(&json!("A=b")));
        assert_eq!(specification["linux"]["resources"]["memory"]["limit"], 104_857_600);
        assert_eq!(specification["linux"]["resources"]["cpu"]["quota"], 200_000);
        let mounts = specification["mounts"].as_array().unwrap();
        let of = |target: &str| mounts.iter().find(|mount| mount["destination"] == target).unwrap();
        assert_eq!(of("/home")["options"], json!(["rbind", "ro"]));
        assert_eq!(
            (&of("/mnt")["source"], &of("/mnt")["options"]),
            (&json!("/data"), &json!(["rbind", "rw"]))
        );
        assert_eq!(specification["root"]["readonly"], true);
    }
}
