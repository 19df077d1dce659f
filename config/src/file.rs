//! Files applied on top of what is already known. What is wrong in them is collected, so that all is said at once.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use crate::classes::{self, Class, Meaning, Use};
use crate::keys::{HYPERVISOR, Key, ours};
use crate::trusted::{self, Links};
use crate::{Agent, Config, Error, Factory, Hypervisor, Place, Problem, Report, Runtime};

/// Longest file.
const MAX_LENGTH: u64 = 1 << 20;

/// The configuration while its files are read.
pub(crate) struct Loader {
    config: Config,
    links: Links,
    /// Where each of our keys was last set, by section and name.
    places: BTreeMap<(&'static str, &'static str), (Place, String)>,
    /// The section of another VMM that was met first.
    vmm: Option<String>,
    uses: Vec<Use>,
    problems: Vec<Problem>,
}

/// The file being applied.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

/// A key of it.
struct Found<'t> {
    section: String,
    name: &'t Spanned<DeString<'t>>,
    value: &'t Spanned<DeValue<'t>>,
}

impl Found<'_> {
    /// Where its value is. That of a table has no place of its own.
    fn span(&self) -> Range<usize> {
        let (name, value) = (self.name.span(), self.value.span());
        if value.start < name.start { name } else { value }
    }
}

impl Source<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.rsplit('\n').next().unwrap_or_default();
        let lines = before.bytes().filter(|byte| *byte == b'\n').count();
        Place { path: self.path.to_owned(), line: 1 + lines, column: 1 + line.chars().count() }
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
            without_meaning: Vec::new(),
        };
        let (uses, problems) = (Vec::new(), Vec::new());
        Self { config, links, places: BTreeMap::new(), vmm: None, uses, problems }
    }

    /// Reads a file; its keys override what was set before.
    pub(crate) fn apply(&mut self, path: &Path) -> Result<(), Error> {
        let text = read(path, self.links).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        self.apply_text(path, &text);
        Ok(())
    }

    pub(crate) fn apply_text(&mut self, path: &Path, text: &str) {
        let (source, known) = (Source { path, text }, (self.uses.len(), self.problems.len()));
        let (document, errors) = DeTable::parse_recoverable(text);
        self.problems.extend(errors.iter().map(|error| Problem::Syntax {
            place: source.place(error.span().unwrap_or_default()),
            why: error.message().to_owned(),
        }));
        // What the parser made of a text that is not TOML is a guess.
        if errors.is_empty() {
            let mut found = Vec::new();
            self.collect(&source, "", document.get_ref(), &mut found);
            // In one file, our own sections win over those of another VMM.
            found.sort_by_key(|key| (classes::other_vmm(&key.section).is_none(), key.name.span().start));
            for found in &found {
                self.apply_key(&source, found);
            }
        }
        let order = |place: &Place| (place.line, place.column);
        self.uses[known.0..].sort_by_key(|used| order(&used.place));
        self.problems[known.1..].sort_by_key(|problem| order(problem.place()));
    }

    /// Looks for keys. What is none must be a section, or a part of one's name.
    fn collect<'t>(
        &mut self,
        source: &Source<'_>,
        section: &str,
        table: &'t DeTable<'t>,
        found: &mut Vec<Found<'t>>,
    ) {
        for (name, value) in table {
            let place = || source.place(name.span());
            let path = if section.is_empty() {
                name.get_ref().to_string()
            } else {
                format!("{section}.{}", name.get_ref())
            };
            match value.get_ref() {
                _ if classes::is_key(section, name.get_ref()) => {
                    found.push(Found { section: section.to_owned(), name, value });
                }
                DeValue::Table(table) if classes::is_section(&path) => {
                    self.enter(place(), &path);
                    self.collect(source, &path, table, found);
                }
                // Only a table written with a header of its own is called a section.
                DeValue::Table(_) if !classes::has_keys(section) => {
                    let nearest = classes::nearest_section(&path);
                    self.problems.push(Problem::UnknownSection { place: place(), section: path, nearest });
                }
                _ => self.unknown(place(), section, name.get_ref()),
            }
        }
    }

    /// Sees to it that there is one other VMM at most: which of two was meant nobody knows.
    fn enter(&mut self, place: Place, section: &str) {
        let Some(vmm) = classes::other_vmm(section) else { return };
        let section = format!("hypervisor.{vmm}");
        match &self.vmm {
            None => self.vmm = Some(section),
            Some(first) if *first == section => {}
            Some(first) => {
                let first = first.clone();
                self.problems.push(Problem::SecondVmm { place, section, first });
            }
        }
    }

    fn unknown(&mut self, place: Place, section: &str, name: &str) {
        let nearest = classes::nearest_key(section, name);
        let remark =
            nearest.as_ref().map_or("unknown".to_owned(), |name| format!("unknown; did you mean {name}?"));
        self.note(place.clone(), section, name, Class::Refused, &remark);
        let (section, key) = (section.to_owned(), name.to_owned());
        self.problems.push(Problem::UnknownKey { place, section, key, nearest });
    }

    fn apply_key(&mut self, source: &Source<'_>, found: &Found<'_>) {
        let (section, name, value) = (&*found.section, &**found.name.get_ref(), found.value.get_ref());
        let place = source.place(found.span());
        match classes::meaning(section, name, value) {
            None => self.unknown(source.place(found.name.span()), section, name),
            Some(Meaning::Nothing(remark)) => self.note(place, section, name, Class::NoMeaning, remark),
            Some(Meaning::Refused(why)) => {
                self.note(place.clone(), section, name, Class::Refused, why);
                let (section, key) = (section.to_owned(), name.to_owned());
                self.problems.push(Problem::Refused { place, section, key, why });
            }
            Some(Meaning::Sets(key, remark)) => self.set(place, section, name, key, value, remark),
        }
    }

    fn set(
        &mut self,
        place: Place,
        section: &str,
        name: &str,
        key: &'static Key,
        value: &DeValue<'_>,
        remark: &str,
    ) {
        match (key.set)(&mut self.config, value) {
            Ok(()) => {
                self.note(place.clone(), section, name, Class::Works, remark);
                if let Some(used) = self.uses.last_mut() {
                    used.sets = Some(ours(key));
                }
                self.places.insert((key.section, key.name), (place, section.to_owned()));
            }
            Err(why) => {
                self.note(place.clone(), section, name, Class::Refused, &why);
                let (section, key) = (section.to_owned(), name.to_owned());
                self.problems.push(Problem::Value { place, section, key, why });
            }
        }
    }

    fn note(&mut self, place: Place, section: &str, name: &str, class: Class, remark: &str) {
        let (section, key, remark) = (section.to_owned(), name.to_owned(), remark.to_owned());
        self.uses.push(Use { place, section, key, class, remark, sets: None });
    }

    /// The keys of the files, and all that is wrong with them, checked against each other as well.
    pub(crate) fn report(mut self) -> (Report, Config) {
        if self.problems.is_empty()
            && let Err(why) = self.config.check()
        {
            let key = "default_vcpus";
            let unset =
                || (Place { path: self.config.path.clone(), line: 1, column: 1 }, HYPERVISOR.to_owned());
            let (place, section) = self.places.get(&(HYPERVISOR, key)).cloned().unwrap_or_else(unset);
            self.problems.push(Problem::Value { place, section, key: key.to_owned(), why });
        }
        (Report { uses: self.uses, problems: self.problems }, self.config)
    }

    /// The configuration.
    pub(crate) fn finish(self) -> Result<Config, Error> {
        let (report, mut config) = self.report();
        if !report.problems.is_empty() {
            return Err(Error::Wrong(report.problems));
        }
        config.without_meaning = report.uses;
        config.without_meaning.retain(|used| used.class == Class::NoMeaning);
        Ok(config)
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
