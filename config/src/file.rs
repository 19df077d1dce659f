//! One file applied on top of what is already known.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use crate::keys::{KEYS, Key};
use crate::trusted::{self, Links};
use crate::{Agent, Config, Error, Factory, Hypervisor, Place, Runtime};

/// Longest file.
const MAX_LENGTH: u64 = 1 << 20;

/// The configuration while its files are read.
pub(crate) struct Loader {
    config: Config,
    links: Links,
    /// Where each key was last set, by section and name.
    places: BTreeMap<(&'static str, &'static str), Place>,
}

/// The file being applied.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let before = self.text.as_bytes().iter().take(span.start);
        Place { path: self.path.to_owned(), line: 1 + before.filter(|byte| **byte == b'\n').count() }
    }
}

impl Loader {
    /// The defaults.
    pub(crate) fn new(path: &Path, links: Links) -> Self {
        let config = Config {
            path: path.to_owned(),
            hypervisor: Hypervisor::default(),
            agent: Agent::default(),
            factory: Factory::default(),
            runtime: Runtime::default(),
        };
        Self { config, links, places: BTreeMap::new() }
    }

    /// Reads a file; its keys override what was set before.
    pub(crate) fn apply(&mut self, path: &Path) -> Result<(), Error> {
        let text = read(path, self.links).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        self.apply_text(path, &text)
    }

    pub(crate) fn apply_text(&mut self, path: &Path, text: &str) -> Result<(), Error> {
        let source = Source { path, text };
        let document = DeTable::parse(text).map_err(|error| Error::Syntax {
            place: source.place(error.span().unwrap_or_default()),
            why: error.message().to_owned(),
        })?;
        self.apply_table(&source, "", document.get_ref())
    }

    fn apply_table(&mut self, source: &Source<'_>, section: &str, table: &DeTable<'_>) -> Result<(), Error> {
        for (name, value) in table {
            match KEYS.iter().find(|key| key.section == section && key.name == name.get_ref()) {
                Some(key) => self.apply_key(source, key, value)?,
                None => self.apply_section(source, section, name, value)?,
            }
        }
        Ok(())
    }

    fn apply_key(
        &mut self,
        source: &Source<'_>,
        key: &Key,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<(), Error> {
        let place = source.place(value.span());
        match (key.set)(&mut self.config, value.get_ref()) {
            Ok(()) => {
                self.places.insert((key.section, key.name), place);
                Ok(())
            }
            Err(why) => {
                Err(Error::Value { place, section: key.section.to_owned(), key: key.name.to_owned(), why })
            }
        }
    }

    /// What is no key must be a section, or a part of one's name.
    fn apply_section(
        &mut self,
        source: &Source<'_>,
        parent: &str,
        name: &Spanned<DeString<'_>>,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<(), Error> {
        let place = source.place(name.span());
        let name = name.get_ref();
        let path = if parent.is_empty() { name.to_string() } else { format!("{parent}.{name}") };
        let known = KEYS.iter().any(|key| {
            key.section.strip_prefix(&path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        });
        match value.get_ref() {
            DeValue::Table(table) if known => self.apply_table(source, &path, table),
            // Only a table written with a header of its own is called a section.
            DeValue::Table(_) if !KEYS.iter().any(|key| key.section == parent) => {
                Err(Error::UnknownSection { place, section: path })
            }
            _ => Err(Error::UnknownKey { place, section: parent.to_owned(), key: name.to_string() }),
        }
    }

    /// Checks the keys against each other.
    pub(crate) fn finish(self) -> Result<Config, Error> {
        let unset = || Place { path: self.config.path.clone(), line: 1 };
        let (section, key) = ("hypervisor.katana", "default_vcpus");
        let place = self.places.get(&(section, key)).cloned().unwrap_or_else(unset);
        let (section, key) = (section.to_owned(), key.to_owned());
        self.config.checked().map_err(|why| Error::Value { place, section, key, why })
    }

    /// The keys that were set, by section and name.
    #[cfg(test)]
    pub(crate) fn set_keys(&self) -> Vec<(&'static str, &'static str)> {
        self.places.keys().copied().collect()
    }
}

/// The file names programs that run as root on the host: nobody else may have written it.
fn read(path: &Path, links: Links) -> io::Result<String> {
    let file = trusted::open(path, links)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_LENGTH + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_LENGTH {
        return Err(io::Error::other(format!("longer than {MAX_LENGTH} bytes")));
    }
    Ok(text)
}
