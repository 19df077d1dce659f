//! A private configuration.toml: the installed one with some values changed.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use toml::{Table, Value};

use crate::environment;

const INSTALLED: &str = "/opt/kata/bin";

/// The content of a configuration.toml.
pub struct Configuration(Table);

impl Configuration {
    /// What is installed beside the programs under test, with paths to those programs.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn installed() -> Self {
        let share = environment::bin().join("../share");
        let path = share.join("defaults/kata-containers/configuration.toml");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let table = text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        if environment::bin() == Path::new(INSTALLED) {
            return Self(table);
        }
        let file = |path: PathBuf| path.display().to_string();
        Self(table)
            .set("hypervisor.katana.path", file(environment::bin().join("kata-vmm")))
            .set("hypervisor.katana.kernel", file(share.join("kata-containers/vmlinux.container")))
            .set("hypervisor.katana.image", file(share.join("kata-containers/kata-containers.img")))
    }

    /// Changes a value; the key is dotted.
    ///
    /// # Panics
    /// When the key's tables are not tables.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        let mut path: Vec<&str> = key.split('.').collect();
        let last = path.pop().expect("a key");
        let mut table = &mut self.0;
        for name in path {
            let inner = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            table = inner.as_table_mut().unwrap_or_else(|| panic!("{name} of {key} is not a table"));
        }
        table.insert(last.to_owned(), value.into());
        self
    }

    /// A text value.
    ///
    /// # Panics
    /// When there is none.
    pub fn text(&self, key: &str) -> String {
        let mut path = key.split('.');
        let first = self.0.get(path.next().expect("a key"));
        let value = path.fold(first, |value, name| value.and_then(|value| value.get(name)));
        value.and_then(Value::as_str).unwrap_or_else(|| panic!("{key} is not set")).to_owned()
    }

    /// As it is written to a file.
    pub fn to_toml(&self) -> String {
        self.0.to_string()
    }

    /// A configuration for programs that are not where the installed one expects them.
    pub fn of_programs_elsewhere() -> Option<PathBuf> {
        static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();
        let write = || {
            // Not in the directory of all users itself, where a configuration is not believed.
            let directory = std::env::temp_dir().join("katana-e2e-configuration");
            std::fs::create_dir_all(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
            let path = directory.join("configuration.toml");
            let text = Self::installed().to_toml();
            std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            path
        };
        PATH.get_or_init(|| (environment::bin() != Path::new(INSTALLED)).then(write)).clone()
    }
}
