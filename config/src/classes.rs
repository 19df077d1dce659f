//! What becomes of a key: our own keys and the table of Kata Containers' asked together.

use std::fmt::{self, Display, Formatter};

use toml::de::DeValue;

use crate::Place;
use crate::kata::{ANNOTATIONS, Fate, Group, TABLE, VMM, VMM_FACTORY, VMMS};
use crate::keys::{HYPERVISOR, KEYS, Key, Sets, TRANSLATED};

/// The three things that can become of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// It is followed.
    Works,
    /// It is accepted, and nothing here depends on it.
    NoMeaning,
    /// It is an error.
    Refused,
}

impl Display for Class {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Works => "works",
            Self::NoMeaning => "no meaning",
            Self::Refused => "refused",
        })
    }
}

/// A key as a file has it, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// Where it is.
    pub place: Place,
    /// The section it stands in.
    pub section: String,
    /// Its name.
    pub key: String,
    /// What becomes of it.
    pub class: Class,
    /// What is to be known of it, or nothing.
    pub remark: String,
    /// What it sets, if it works.
    pub sets: Option<Sets>,
}

/// What becomes of a key with a value.
pub(crate) enum Meaning {
    /// It sets something.
    Sets(&'static Key, &'static str),
    /// Nothing, for this reason.
    Nothing(&'static str),
    /// It is refused, for this reason.
    Refused(&'static str),
}

/// What becomes of a key; nothing if neither Kata Containers nor we have it.
pub(crate) fn meaning(section: &str, name: &str, value: &DeValue<'_>) -> Option<Meaning> {
    let (group, own) = (group(section, name), own(section, name));
    let remark = group.map_or("", |group| group.remark);
    Some(match (group.map(|group| group.fate), own) {
        (Some(Fate::WorksBut(values)), _) if values.covers(value) => Meaning::Nothing(remark),
        // A remark of the table is about the section of another VMM.
        (_, Some(key)) => Meaning::Sets(key, ""),
        (Some(Fate::Refused(values)), _) if values.covers(value) => Meaning::Refused(remark),
        (Some(Fate::Refused(_)), _) => Meaning::Nothing("as it is set, it asks for nothing"),
        (Some(Fate::Nothing), _) => Meaning::Nothing(remark),
        (Some(Fate::Works | Fate::WorksBut(_)), None) => Meaning::Sets(translated(section, name)?, remark),
        (None, None) => return None,
    })
}

/// Whether there is a key of this name.
pub(crate) fn is_key(section: &str, name: &str) -> bool {
    own(section, name).is_some() || group(section, name).is_some()
}

/// Whether there are keys in a section of this name, or in one whose name begins with it.
pub(crate) fn is_section(path: &str) -> bool {
    let path = common(path);
    let begins = |section: &str| {
        section.strip_prefix(&*path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    sections().any(begins)
}

/// Whether a section can have keys.
pub(crate) fn has_keys(section: &str) -> bool {
    let section = common(section);
    sections().any(|other| other == section)
}

/// The VMM, other than ours, that a section is of.
pub(crate) fn other_vmm(section: &str) -> Option<&str> {
    let vmm = section.strip_prefix("hypervisor.")?.split('.').next()?;
    VMMS.contains(&vmm).then_some(vmm)
}

/// What becomes of an annotation that is no key of a file; nothing if it may be one.
pub(crate) fn annotation(name: &str, value: &DeValue<'_>) -> Option<Meaning> {
    meaning(ANNOTATIONS, name, value)
}

fn sections() -> impl Iterator<Item = &'static str> {
    let table = TABLE.iter().map(|group| group.section).filter(|section| *section != ANNOTATIONS);
    KEYS.iter().map(|key| key.section).chain(table)
}

/// The name of a section in the table.
fn common(section: &str) -> String {
    let ours = section == HYPERVISOR || section.starts_with("hypervisor.katana.");
    match other_vmm(section).or(ours.then_some("katana")) {
        Some(vmm) => section.replacen(vmm, "*", 1),
        None => section.to_owned(),
    }
}

fn group(section: &str, name: &str) -> Option<&'static Group> {
    let in_section =
        |section: &str| TABLE.iter().find(|group| group.section == section && group.names.contains(&name));
    in_section(section).or_else(|| in_section(&common(section)))
}

fn own(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// What a key of Kata Containers sets, where that is no key of ours in the same section.
fn translated(section: &str, name: &str) -> Option<&'static Key> {
    let section = common(section);
    let translated = TRANSLATED.iter().map(|(key, _)| key);
    let translated = translated.into_iter().find(|key| key.section == section && key.name == name);
    let ours = match &*section {
        VMM => HYPERVISOR,
        VMM_FACTORY => "factory",
        other => other,
    };
    translated.or_else(|| own(ours, name))
}

/// The known key of a section with the most similar name, in quotes, or that of another section with this very name.
pub(crate) fn nearest_key(section: &str, name: &str) -> Option<String> {
    let own = KEYS.iter().map(|key| (key.section, key.name));
    let table = TABLE.iter().flat_map(|group| group.names.iter().map(|name| (group.section, *name)));
    let all = || own.clone().chain(table.clone()).filter(|(section, _)| *section != ANNOTATIONS);
    let here = all().filter(|(other, _)| *other == section || *other == common(section));
    if let Some(key) = nearest(name, 3, here.map(|(_, key)| key), |key| key) {
        return Some(format!("\"{key}\""));
    }
    let (section, key) = all().find(|(_, key)| *key == name)?;
    Some(format!("\"{key}\" in [{}]", section.replace('*', "katana")))
}

/// The known section with the most similar name, in brackets.
pub(crate) fn nearest_section(section: &str) -> Option<String> {
    let vmms = VMMS.iter().map(|vmm| format!("hypervisor.{vmm}"));
    let all = sections().filter(|other| !other.contains('*')).map(str::to_owned).chain(vmms);
    nearest(section, 2, all, |candidate| candidate).map(|section| format!("[{section}]"))
}

/// The candidate that fewest changes lead to: at most `most`, and one for every three characters.
fn nearest<T: Ord>(name: &str, most: usize, all: impl Iterator<Item = T>, text: fn(&T) -> &str) -> Option<T> {
    let length = name.chars().take(100).count();
    // Nobody means one of ours by a name of that length, and to compare it takes long.
    let most = if length < 100 { most.min(length / 3) } else { return None };
    let distances = all.map(|candidate| (strsim::damerau_levenshtein(name, text(&candidate)), candidate));
    distances.filter(|(distance, _)| *distance <= most).min().map(|(_, candidate)| candidate)
}
