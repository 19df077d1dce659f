//! Mount options, as mount(8) and the OCI runtime specification name them (config.md, "Linux mount options").

use super::control::{Failure, Result};
use katana_protocol::mount::MountAttributes;
use libc::{
    MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_STRICTATIME,
};

/// How a bind mount is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bind {
    /// The source alone.
    Single,
    /// The source with what is mounted below it.
    Recursive,
}

/// The meaning of a list of options.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `bind` or `rbind`.
    pub bind: Option<Bind>,
    /// For the mount itself.
    pub attributes: MountAttributes,
    /// For the mount and all below it (`rro` and the like).
    pub recursive: MountAttributes,
    /// MS_SHARED and the like, and whether for all below as well; in order.
    pub propagation: Vec<(u64, bool)>,
    /// Copy what the image has at the mount point into a new tmpfs.
    pub copy_up: bool,
    /// For the file system.
    pub data: Vec<String>,
}

enum Meaning {
    Set(u64),
    Clear(u64),
    /// Access time: a value under the mask.
    AccessTime(u64),
    Bind(Bind),
    Propagation(u64),
    /// Known, and without effect on a mount that is made new.
    Nothing,
}

const MS_UNBINDABLE: u64 = libc::MS_UNBINDABLE;
const MS_PRIVATE: u64 = libc::MS_PRIVATE;
const MS_SLAVE: u64 = libc::MS_SLAVE;
const MS_SHARED: u64 = libc::MS_SHARED;

const TABLE: &[(&str, Meaning)] = &[
    ("async", Meaning::Nothing),
    ("atime", Meaning::AccessTime(0)),
    ("bind", Meaning::Bind(Bind::Single)),
    ("defaults", Meaning::Nothing),
    ("dev", Meaning::Clear(MOUNT_ATTR_NODEV)),
    ("diratime", Meaning::Clear(MOUNT_ATTR_NODIRATIME)),
    ("exec", Meaning::Clear(MOUNT_ATTR_NOEXEC)),
    ("iversion", Meaning::Nothing),
    ("loud", Meaning::Nothing),
    ("mand", Meaning::Nothing),
    ("noatime", Meaning::AccessTime(MOUNT_ATTR_NOATIME)),
    ("nodev", Meaning::Set(MOUNT_ATTR_NODEV)),
    ("nodiratime", Meaning::Set(MOUNT_ATTR_NODIRATIME)),
    ("noexec", Meaning::Set(MOUNT_ATTR_NOEXEC)),
    ("noiversion", Meaning::Nothing),
    ("nolazytime", Meaning::Nothing),
    ("nomand", Meaning::Nothing),
    ("norelatime", Meaning::Nothing),
    ("nostrictatime", Meaning::AccessTime(0)),
    ("nosuid", Meaning::Set(MOUNT_ATTR_NOSUID)),
    ("nosymfollow", Meaning::Set(MOUNT_ATTR_NOSYMFOLLOW)),
    ("private", Meaning::Propagation(MS_PRIVATE)),
    ("rbind", Meaning::Bind(Bind::Recursive)),
    ("relatime", Meaning::AccessTime(0)),
    ("remount", Meaning::Nothing),
    ("ro", Meaning::Set(MOUNT_ATTR_RDONLY)),
    ("rw", Meaning::Clear(MOUNT_ATTR_RDONLY)),
    ("shared", Meaning::Propagation(MS_SHARED)),
    ("silent", Meaning::Nothing),
    ("slave", Meaning::Propagation(MS_SLAVE)),
    ("strictatime", Meaning::AccessTime(MOUNT_ATTR_STRICTATIME)),
    ("suid", Meaning::Clear(MOUNT_ATTR_NOSUID)),
    ("symfollow", Meaning::Clear(MOUNT_ATTR_NOSYMFOLLOW)),
    ("unbindable", Meaning::Propagation(MS_UNBINDABLE)),
];

fn meaning(option: &str) -> Option<&'static Meaning> {
    TABLE
        .binary_search_by_key(&option, |entry| entry.0)
        .ok()
        .and_then(|at| TABLE.get(at))
        .map(|entry| &entry.1)
}

/// Understands a list of options. What no table knows is for the file system.
pub fn parse(options: &[String]) -> Result<Options> {
    let mut parsed = Options::default();
    for option in options.iter().map(String::as_str).filter(|option| !option.is_empty()) {
        if let Some(meaning) = meaning(option) {
            parsed.apply(meaning, false);
        } else if let Some(meaning) = option.strip_prefix('r').and_then(meaning) {
            parsed.apply(meaning, true);
        } else if option == "tmpcopyup" {
            parsed.copy_up = true;
        } else if option == "idmap" || option == "ridmap" {
            return Err(Failure::invalid(format!("mount option {option} is not supported")));
        } else {
            parsed.data.push(option.to_owned());
        }
    }
    Ok(parsed)
}

impl Options {
    fn apply(&mut self, meaning: &Meaning, recursive: bool) {
        let attributes = if recursive { &mut self.recursive } else { &mut self.attributes };
        match *meaning {
            // The last one wins: "rw,ro" is read-only.
            Meaning::Set(bit) => {
                (attributes.set, attributes.clear) = (attributes.set | bit, attributes.clear & !bit);
            }
            Meaning::Clear(bit) => {
                (attributes.set, attributes.clear) = (attributes.set & !bit, attributes.clear | bit);
            }
            // mount_setattr(2): the mask has to be cleared for any of its values to be set.
            Meaning::AccessTime(value) => {
                attributes.set = attributes.set & !MOUNT_ATTR__ATIME | value;
                attributes.clear |= MOUNT_ATTR__ATIME;
            }
            Meaning::Bind(bind) => self.bind = Some(bind),
            Meaning::Propagation(propagation) => self.propagation.push((propagation, recursive)),
            Meaning::Nothing => (),
        }
    }
}

/// `linux.rootfsPropagation`.
pub fn propagation(name: &str) -> Result<(u64, bool)> {
    match parse(&[name.to_owned()])?.propagation.as_slice() {
        [propagation] => Ok(*propagation),
        _ => Err(Failure::invalid(format!("rootfsPropagation {name:?} is not a propagation"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Options {
        parse(&text.split(',').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_table_is_sorted() {
        assert!(TABLE.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn what_containerd_writes_is_understood() {
        let dev = options("nosuid,strictatime,mode=755,size=65536k");
        assert_eq!(dev.attributes.set, MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME);
        assert_eq!(dev.attributes.clear, MOUNT_ATTR__ATIME);
        assert_eq!(dev.data, ["mode=755", "size=65536k"]);

        let volume = options("rbind,rprivate,ro");
        assert_eq!(volume.bind, Some(Bind::Recursive));
        assert_eq!(volume.propagation, [(MS_PRIVATE, true)]);
        assert_eq!(
            (volume.attributes.set, volume.recursive),
            (MOUNT_ATTR_RDONLY, MountAttributes::default())
        );
    }

    #[test]
    fn recursive_forms_are_for_all_below() {
        let deep = options("rbind,rro,rnosuid,rnoatime,rexec");
        assert_eq!(deep.recursive.set, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOATIME);
        assert_eq!(deep.recursive.clear, MOUNT_ATTR__ATIME | MOUNT_ATTR_NOEXEC);
        assert_eq!(deep.attributes, MountAttributes::default());
        assert!(deep.data.is_empty());
    }

    /// What the shim announces is what there is, no more and no less.
    #[test]
    fn what_is_announced_is_understood() {
        for &option in katana_protocol::mount_options::MOUNT_OPTIONS {
            assert!(options(option).data.is_empty(), "{option}");
        }
        let missing =
            |entry: &&(&str, Meaning)| !katana_protocol::mount_options::MOUNT_OPTIONS.contains(&entry.0);
        assert_eq!(TABLE.iter().find(missing).map(|entry| entry.0), None);
    }

    #[test]
    fn the_last_option_wins_and_unknown_ones_pass_on() {
        assert_eq!(options("ro,rw").attributes.set, 0);
        assert_eq!(options("rw,ro").attributes.set, MOUNT_ATTR_RDONLY);
        assert_eq!(options("noatime,strictatime").attributes.set, MOUNT_ATTR_STRICTATIME);
        assert_eq!(options("uid=7,weird").data, ["uid=7", "weird"]);
        assert!(parse(&["ridmap".to_owned()]).is_err());
        assert!(propagation("rslave").is_ok() && propagation("ro").is_err());
    }
}
