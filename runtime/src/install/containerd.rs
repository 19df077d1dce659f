//! containerd's configuration: the runtime "kata" of its CRI plugin.
//!
//! A file of version 3 or newer (containerd 2) is only told to import another one, which is ours alone. One of version 2
//! gets a table of its own: containerd 1 takes an imported table in place of the whole plugin's, and whatever else was
//! configured of it would be lost. k3s and RKE2 write their configuration anew at each start, from a template that is
//! text and not TOML; with containerd 2 it imports all files of a directory.

use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, Item, TableLike, Value};

use super::change::{self, Change};
use super::edit::{self, Entry};

/// Of containerd 1.
const ONE: Format = Format {
    text: include_str!("../../../config/containerd-1.toml"),
    plugin: "io.containerd.grpc.v1.cri",
    switches: &["io.containerd.grpc.v1.cri", "cri"],
};
/// Of containerd 2.
const TWO: Format = Format {
    text: include_str!("../../../config/containerd-2.toml"),
    plugin: "io.containerd.cri.v1.runtime",
    switches: &["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"],
};
/// The runtime's name, and the shim's.
const NAME: &str = "kata";
const TYPE: &str = "io.containerd.kata.v2";
const DROP_IN: &str = "katana.toml";
/// Of the Go templates of k3s and RKE2: all that they would have configured themselves.
const BASE: &str = "{{ template \"base\" . }}\n";

/// Why a configuration stays as it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    File(#[from] change::Error),
    #[error("{} does not parse: {source}", path.display())]
    Parse { path: PathBuf, source: toml_edit::TomlError },
    #[error(
        "{} has no version, or version 1, which containerd 2 does not read any more: write what containerd config migrate \
         prints to it, or begin it with version = 2",
        path.display()
    )]
    Version { path: PathBuf },
    #[error(
        "{} has a runtime \"{NAME}\" already, which is not {TYPE} but {found}: remove it or give it another name",
        path.display()
    )]
    Taken { path: PathBuf, found: String },
    #[error("{}: {what} is written in a form to which nothing can be added; add this by hand:\n{text}", path.display())]
    Shape { path: PathBuf, what: &'static str, text: String },
    #[error("{} has been changed since: take the runtime \"{NAME}\" out by hand", path.display())]
    Edited { path: PathBuf },
}

struct Format {
    text: &'static str,
    plugin: &'static str,
    /// How the plugin may be named in `disabled_plugins`.
    switches: &'static [&'static str],
}

impl Format {
    fn of(version: i64) -> &'static Self {
        if version < 3 { &ONE } else { &TWO }
    }

    /// The table alone, to be added to a file.
    fn table(&self) -> &'static str {
        self.text.find("\n[plugins").map_or(self.text, |start| &self.text[start + 1..])
    }

    fn header(&self) -> String {
        format!("[plugins.{}.containerd.runtimes.{NAME}]", self.plugin)
    }
}

/// What is to be changed for one configuration file, and what else there is to say.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) changes: Vec<Change>,
    pub(crate) note: Option<String>,
}

/// Adds the runtime to a file of the host whose root directory is `root`. `version` is that of a file which is not there
/// yet.
pub(crate) fn install(root: &Path, path: &Path, version: i64) -> Result<Plan, Error> {
    let text = change::read(path)?;
    if is_template(path) {
        return Ok(Plan {
            changes: edit::add(path, &Template { path, format: template_format(path) })?,
            note: None,
        });
    }
    let document = parse(path, text.as_deref().unwrap_or_default())?;
    let generated = text.as_deref().is_some_and(is_generated);
    let version = if text.is_none() { version } else { version_of(&document) };
    let format = Format::of(version);
    if is_disabled(&document, format) {
        let note = format!(
            "{}: the CRI plugin is disabled, so Kubernetes does not use this containerd; nothing is added: ctr, \
             nerdctl and Docker need no configuration of containerd",
            path.display()
        );
        return Ok(Plan { changes: Vec::new(), note: Some(note) });
    }
    if text.is_some() && version < 2 {
        return Err(Error::Version { path: path.to_owned() });
    }
    if has_runtime(&document, format, path)? {
        return Ok(Plan::default());
    }
    let imported = imported_directory(&document, root, path);
    let mut changes = Vec::new();
    if version >= 3 && (imported.is_some() || !generated) {
        let drop_in = imported.unwrap_or_else(|| parent(path).join("conf.d")).join(DROP_IN);
        if let Some(there) = change::read(&drop_in)? {
            // What somebody has adapted stays.
            has_runtime(&parse(&drop_in, &there)?, format, &drop_in)?;
        } else {
            changes.extend(Change::of_text(&drop_in, None, Some(format.text.to_owned())));
        }
        changes.extend(edit::add(path, &Import { root, path })?);
    } else if generated {
        let template = template(path, version);
        changes = edit::add(&template, &Template { path: &template, format })?;
    } else {
        changes = edit::add(path, &Table { path, format })?;
    }
    Ok(Plan { changes, note: None })
}

/// Takes the runtime out, from wherever `install` may have put it for this configuration file.
pub(crate) fn uninstall(root: &Path, path: &Path) -> Result<Plan, Error> {
    let mut changes = Vec::new();
    let mut templates = vec![path.to_owned()];
    if !is_template(path) {
        let document = parse(path, change::read(path)?.as_deref().unwrap_or_default())?;
        let version = version_of(&document);
        changes = if version < 3 {
            edit::remove(path, &Table { path, format: Format::of(version) })?
        } else {
            edit::remove(path, &Import { root, path })?
        };
        let conf_d = parent(path).join("conf.d");
        for directory in [Some(conf_d), imported_directory(&document, root, path)].into_iter().flatten() {
            let drop_in = directory.join(DROP_IN);
            if !changes.iter().any(|change| change.path == drop_in) {
                changes.extend(Change::of_text(&drop_in, change::read(&drop_in)?, None));
            }
        }
        templates = vec![template(path, 2), template(path, 3)];
    }
    for path in &templates {
        changes.extend(edit::remove(path, &Template { path, format: template_format(path) })?);
    }
    Ok(Plan { changes, note: None })
}

/// An own table, in a file of version 2.
struct Table<'a> {
    path: &'a Path,
    format: &'static Format,
}

impl Entry for Table<'_> {
    type Error = Error;

    fn add(&self, text: Option<&str>) -> Result<Option<String>, Error> {
        let Some(text) = text else { return Ok(Some(self.format.text.to_owned())) };
        if has_runtime(&parse(self.path, text)?, self.format, self.path)? {
            return Ok(None);
        }
        let after = appended(text, self.format.table());
        // A table that is written as one value cannot be continued elsewhere.
        match after.parse() {
            Ok(document) if has_runtime(&document, self.format, self.path)? => Ok(Some(after)),
            _ => Err(Error::Shape {
                path: self.path.to_owned(),
                what: "the table of the CRI plugin's runtimes",
                text: self.format.table().to_owned(),
            }),
        }
    }

    fn remove(&self, text: &str) -> Result<String, Error> {
        if let Some(text) = without(text, self.format.table()) {
            return Ok(text);
        }
        let mut document = parse(self.path, text)?;
        if let Some(runtimes) = runtimes_mut(&mut document, self.format) {
            runtimes.remove(NAME);
        }
        Ok(document.to_string())
    }
}

/// An import, in a file of version 3.
struct Import<'a> {
    root: &'a Path,
    path: &'a Path,
}

impl Import<'_> {
    /// As the host names it.
    fn drop_in(&self) -> String {
        let path = parent(self.path).join("conf.d").join(DROP_IN);
        let inside = path.strip_prefix(self.root).map(|inner| Path::new("/").join(inner));
        inside.unwrap_or(path).display().to_string()
    }

    fn imports<'a>(&self, document: &'a mut DocumentMut) -> Result<&'a mut Array, Error> {
        let empty = || Item::Value(Value::Array(Array::new()));
        let imports = document.entry("imports").or_insert_with(empty);
        imports.as_array_mut().ok_or_else(|| Error::Shape {
            path: self.path.to_owned(),
            what: "`imports`",
            text: format!("imports = [\"{}\"]", self.drop_in()),
        })
    }
}

impl Entry for Import<'_> {
    type Error = Error;

    fn add(&self, text: Option<&str>) -> Result<Option<String>, Error> {
        let mut document = parse(self.path, text.unwrap_or("version = 3\n"))?;
        let drop_in = self.drop_in();
        if imported_directory(&document, self.root, self.path).is_some() {
            return Ok(None);
        }
        let imports = self.imports(&mut document)?;
        if imports.iter().any(|one| one.as_str() == Some(&drop_in)) {
            return Ok(None);
        }
        imports.push(drop_in);
        Ok(Some(document.to_string()))
    }

    fn remove(&self, text: &str) -> Result<String, Error> {
        let mut document = parse(self.path, text)?;
        let drop_in = self.drop_in();
        let imports = self.imports(&mut document)?;
        imports.retain(|one| one.as_str() != Some(&drop_in));
        if imports.is_empty() {
            document.remove("imports");
        }
        // It was of version 2, got a table, and was migrated with that.
        if let Some(runtimes) = runtimes_mut(&mut document, &TWO) {
            runtimes.remove(NAME);
        }
        Ok(document.to_string())
    }
}

/// A template of k3s or RKE2, which is handled as text.
struct Template<'a> {
    path: &'a Path,
    format: &'static Format,
}

impl Entry for Template<'_> {
    type Error = Error;

    fn add(&self, text: Option<&str>) -> Result<Option<String>, Error> {
        let Some(text) = text else { return Ok(Some(appended(BASE, self.format.table()))) };
        if text.contains(self.format.table()) {
            return Ok(None);
        }
        let header = self.format.header();
        let is_header = |line: &str| line.replace(['"', '\'', ' '], "") == header;
        if text.lines().any(is_header) {
            return Err(Error::Taken { path: self.path.to_owned(), found: "another text".to_owned() });
        }
        Ok(Some(appended(text, self.format.table())))
    }

    fn remove(&self, text: &str) -> Result<String, Error> {
        without(text, self.format.table()).ok_or_else(|| Error::Edited { path: self.path.to_owned() })
    }
}

fn appended(text: &str, table: &str) -> String {
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    format!("{text}{end}\n{table}")
}

/// A text without the table and the empty line before it, if they are in it.
fn without(text: &str, table: &str) -> Option<String> {
    let start = text.find(table)?;
    let before = &text[..start];
    Some(format!("{}{}", before.strip_suffix('\n').unwrap_or(before), &text[start + table.len()..]))
}

fn parse(path: &Path, text: &str) -> Result<DocumentMut, Error> {
    text.parse().map_err(|source| Error::Parse { path: path.to_owned(), source })
}

fn version_of(document: &DocumentMut) -> i64 {
    document.get("version").and_then(Item::as_integer).unwrap_or(1)
}

fn is_disabled(document: &DocumentMut, format: &Format) -> bool {
    let disabled = document.get("disabled_plugins").and_then(Item::as_array);
    disabled.into_iter().flatten().filter_map(Value::as_str).any(|name| format.switches.contains(&name))
}

/// Whether the runtime is there already.
fn has_runtime(document: &DocumentMut, format: &Format, path: &Path) -> Result<bool, Error> {
    let table = |item: &Item| item.is_table_like();
    let mut place = Some(document.as_item());
    for key in ["plugins", format.plugin, "containerd", "runtimes", NAME] {
        place = place.filter(|item| table(item)).and_then(|item| item.get(key));
    }
    let Some(runtime) = place else { return Ok(false) };
    match runtime.get("runtime_type").and_then(Item::as_str) {
        Some(TYPE) => Ok(true),
        found => Err(Error::Taken { path: path.to_owned(), found: found.unwrap_or("of no type").to_owned() }),
    }
}

fn runtimes_mut<'a>(document: &'a mut DocumentMut, format: &Format) -> Option<&'a mut dyn TableLike> {
    let mut place: &mut dyn TableLike = document.as_table_mut();
    for key in ["plugins", format.plugin, "containerd", "runtimes"] {
        place = place.get_mut(key)?.as_table_like_mut()?;
    }
    Some(place)
}

/// A directory of which all files are imported.
fn imported_directory(document: &DocumentMut, root: &Path, path: &Path) -> Option<PathBuf> {
    let imports = document.get("imports").and_then(Item::as_array);
    let mut patterns = imports.into_iter().flatten().filter_map(Value::as_str);
    let directory = patterns.find_map(|pattern| pattern.strip_suffix("/*.toml"))?;
    let is_plain = !directory.contains(['*', '?', '[', '\\']);
    // Relative to the file that imports them, in containerd as well.
    let place = |directory: &str| match directory.strip_prefix('/') {
        Some(inside) => root.join(inside),
        None => parent(path).join(directory),
    };
    is_plain.then(|| place(directory))
}

/// Whether k3s or RKE2 wrote this file, and will again.
fn is_generated(text: &str) -> bool {
    text.lines().any(|line| line.starts_with("# File generated by") && line.contains("DO NOT EDIT"))
}

fn is_template(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "tmpl")
}

/// By the names that k3s and RKE2 look for.
fn template(path: &Path, version: i64) -> PathBuf {
    parent(path).join(if version < 3 { "config.toml.tmpl" } else { "config-v3.toml.tmpl" })
}

fn template_format(path: &Path) -> &'static Format {
    if path.ends_with("config-v3.toml.tmpl") { &TWO } else { &ONE }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}
