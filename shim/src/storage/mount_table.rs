//! What is mounted where: mountinfo, proc(5).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Of no other mount that is there at the same time.
    pub id: u64,
    /// The mount on which it is.
    pub parent: u64,
    /// Whether what is mounted on it shows on others.
    pub shared: bool,
    /// Where.
    pub point: PathBuf,
    /// The numbers of the device, and what of its file system is mounted.
    origin: String,
    /// Those of the mount, which are not all that its file system has.
    flags: String,
}

impl Mounted {
    /// What of its file system is mounted: a path from that file system's root.
    pub fn root(&self) -> Option<PathBuf> {
        self.origin.split_once(' ').map(|(_, root)| unescape(root.as_bytes()))
    }

    /// The numbers of its device.
    pub fn device(&self) -> &str {
        self.origin.split(' ').next().unwrap_or_default()
    }

    /// Whether this is a file that stands for a mount namespace, as snapd and unshare(1) keep them.
    pub fn is_mount_namespace(&self) -> bool {
        self.origin.contains(" mnt:[")
    }

    /// The same with a path relative to the namespace's root.
    pub fn relative(&self) -> Self {
        self.at(self.point.strip_prefix("/").unwrap_or(&self.point).to_owned())
    }

    /// The same at another place.
    pub fn at(&self, point: PathBuf) -> Self {
        Self { point, ..self.clone() }
    }

    /// The same without some flags.
    pub fn without(&self, flags: &[&str]) -> Self {
        let left: Vec<_> = self.flags.split(',').filter(|flag| !flags.contains(flag)).collect();
        Self { flags: left.join(","), ..self.clone() }
    }

    /// The flags that are for the guest's kernel to heed, as options. What is read-only the host's kernel sees to.
    pub fn restrictions(&self) -> Vec<String> {
        let restricts = |flag: &&str| ["nosuid", "nodev", "noexec"].contains(flag);
        self.flags.split(',').filter(restricts).map(str::to_owned).collect()
    }
}

/// What is mounted in the host's namespace, which is this program's.
pub fn host() -> io::Result<Vec<Mounted>> {
    read(File::open("/proc/thread-self/mountinfo")?)
}

/// What a mountinfo lists.
pub fn read(mut file: File) -> io::Result<Vec<Mounted>> {
    let mut info = Vec::new();
    file.read_to_end(&mut info)?;
    Ok(info.split(|byte| *byte == b'\n').filter_map(mounted).collect())
}

/// The mount points at and below `directory`, in the order of mounting.
pub fn below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let points = host()?.into_iter().map(|mounted| mounted.point);
    Ok(points.filter(|point| point.starts_with(directory)).collect())
}

/// What is seen of what is mounted at and below `directory`, outer mounts first.
pub fn tree<'a>(all: &'a [Mounted], directory: &Path) -> Vec<&'a Mounted> {
    let below = all.iter().filter(|mounted| mounted.point.starts_with(directory));
    // Of several at one point, the last one is seen. A path comes before those that it begins.
    let seen: BTreeMap<_, _> = below.map(|mounted| (&mounted.point, mounted)).collect();
    seen.into_values().collect()
}

/// A place in a namespace: a path without links, and what is mounted there.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// The path.
    pub place: &'a Path,
    /// All mounts of the namespace.
    pub all: &'a [Mounted],
}

/// Whether two places show the same if they are the same directory or file: mounts with the same flags, and below them
/// the same mounts. Whether they are read-only counts if `exactly`.
pub fn look_alike(one: Sight<'_>, other: Sight<'_>, exactly: bool) -> bool {
    let look = |Sight { place, all }| {
        let flags = |mounted: &Mounted| match mounted.flags.strip_prefix("ro").filter(|_| !exactly) {
            Some(others) => format!("rw{others}"),
            None => mounted.flags.clone(),
        };
        let here = all.iter().filter(|mounted| Path::starts_with(place, &mounted.point));
        let top = here.max_by_key(|mounted| mounted.point.components().count()).map(flags);
        let below = all.iter().filter(|mounted| mounted.point != place);
        let below: BTreeMap<_, _> = below
            .filter_map(|mounted| {
                let point = mounted.point.strip_prefix(place).ok()?.to_owned();
                Some((point, (mounted.origin.clone(), flags(mounted))))
            })
            .collect();
        (top, below)
    };
    look(one) == look(other)
}

fn mounted(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let (device, root, point, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let shared = fields.take_while(|field| *field != b"-").any(|field| field.starts_with(b"shared:"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let origin = format!("{} {}", text(device), text(root));
    Some(Mounted { id, parent, shared, point: unescape(point), origin, flags: text(flags) })
}

/// White space is written as octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(value) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            path.push(value);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            path.push(byte);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_decoded() {
        let line = b"36 35 98:0 /part /mnt/a\\040b\\134c rw,noexec shared:1 - ext4 /dev/root rw";
        let found = mounted(line).unwrap();
        assert_eq!(found.root(), Some(PathBuf::from("/part")));
        assert_eq!((found.point, found.origin.as_str()), (PathBuf::from("/mnt/a b\\c"), "98:0 /part"));
        assert_eq!((found.flags.as_str(), found.id, found.parent, found.shared), ("rw,noexec", 36, 35, true));
        assert!(!mounted(b"36 35 98:0 / /mnt rw master:2 - ext4 /dev/shared:1 rw").unwrap().shared);
        assert_eq!(unescape(b"/x\\9"), PathBuf::from("/x\\9"));
        assert_eq!(unescape(b"/x\\04"), PathBuf::from("/x\\04"));
        assert_eq!(mounted(b"1 2"), None);
    }

    #[test]
    fn what_is_seen_below_comes_from_the_outside_to_the_inside() {
        let lines: [&[u8]; 5] = [
            b"1 1 0:5 / /v/0/a/b rw,nosuid,nodev,noexec,relatime - tmpfs none rw",
            b"2 1 0:6 / /v/0 rw - tmpfs none rw",
            b"3 1 0:7 / /v/0/a rw - tmpfs none rw",
            b"4 1 0:8 / /v/0/a ro,noatime - tmpfs none rw",
            b"5 1 0:9 / /v/01 rw - tmpfs none rw",
        ];
        let all: Vec<_> = lines.iter().filter_map(|line| mounted(line)).collect();
        let found = tree(&all, Path::new("/v/0"));
        let found: Vec<_> = found
            .iter()
            .map(|mounted| (mounted.point.to_str().unwrap(), mounted.restrictions().join(",")))
            .collect();
        let expected = [("/v/0", ""), ("/v/0/a", ""), ("/v/0/a/b", "nosuid,nodev,noexec")];
        assert_eq!(found, expected.map(|(point, flags)| (point, flags.to_owned())));
    }
}
