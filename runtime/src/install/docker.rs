//! Docker's daemon.json: the runtime "kata".

use std::path::{Path, PathBuf};

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstInputValue, CstObject, CstRootNode};
use serde_json::Value;

use super::change;
use super::edit::Entry;

const TEXT: &str = include_str!("../../../config/docker-daemon.json");
const RUNTIMES: &str = "runtimes";
const NAME: &str = "kata";
const TYPE: (&str, &str) = ("runtimeType", "io.containerd.kata.v2");

/// Why the file stays as it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    File(#[from] change::Error),
    #[error("{} does not parse: {source}", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("{} is not what Docker reads: {what} is not an object", path.display())]
    Shape { path: PathBuf, what: &'static str },
    #[error(
        "{} has a runtime \"{NAME}\" already, which is another one: {found}: remove it or give it another name",
        path.display()
    )]
    Taken { path: PathBuf, found: Value },
}

/// The runtime in daemon.json.
pub(crate) struct Runtime<'a> {
    pub(crate) path: &'a Path,
}

impl Runtime<'_> {
    fn shape(&self, what: &'static str) -> Error {
        Error::Shape { path: self.path.to_owned(), what }
    }

    /// The text as a tree that keeps its form, and its outermost object.
    fn open(&self, text: &str) -> Result<(CstRootNode, CstObject), Error> {
        // Docker's own rules are stricter than those of the library that keeps the form.
        let strict = serde_json::from_str::<Value>(text);
        strict.map_err(|source| Error::Parse { path: self.path.to_owned(), source })?;
        let tree = CstRootNode::parse(text, &ParseOptions::default()).map_err(|_| self.shape("the whole"))?;
        let object = tree.object_value().ok_or_else(|| self.shape("the whole"))?;
        Ok((tree, object))
    }
}

impl Entry for Runtime<'_> {
    type Error = Error;

    fn add(&self, text: Option<&str>) -> Result<Option<String>, Error> {
        let Some(text) = text.filter(|text| !text.trim().is_empty()) else {
            return Ok(Some(TEXT.to_owned()));
        };
        let (tree, object) = self.open(text)?;
        let runtimes = object.object_value_or_create(RUNTIMES).ok_or_else(|| self.shape("\"runtimes\""))?;
        if let Some(there) = runtimes.get(NAME) {
            let there = there.value().and_then(|value| value.to_serde_value()).unwrap_or_default();
            let same = there.get(TYPE.0).and_then(Value::as_str) == Some(TYPE.1);
            return if same {
                Ok(None)
            } else {
                Err(Error::Taken { path: self.path.to_owned(), found: there })
            };
        }
        let value =
            CstInputValue::Object(vec![(TYPE.0.to_owned(), CstInputValue::String(TYPE.1.to_owned()))]);
        runtimes.append(NAME, value);
        Ok(Some(tree.to_string()))
    }

    fn remove(&self, text: &str) -> Result<String, Error> {
        let (tree, object) = self.open(text)?;
        if let Some(runtimes) = object.object_value(RUNTIMES) {
            if let Some(entry) = runtimes.get(NAME) {
                entry.remove();
            }
            if runtimes.properties().is_empty()
                && let Some(runtimes) = object.get(RUNTIMES)
            {
                runtimes.remove();
            }
        }
        Ok(tree.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> Runtime<'static> {
        Runtime { path: Path::new("/etc/docker/daemon.json") }
    }

    fn added(text: &str) -> String {
        let after = runtime().add(Some(text)).unwrap().unwrap();
        let value: Value = serde_json::from_str(&after).unwrap();
        assert_eq!(value["runtimes"]["kata"]["runtimeType"], "io.containerd.kata.v2", "{after}");
        assert_eq!(runtime().add(Some(&after)).unwrap(), None);
        after
    }

    #[test]
    fn all_else_keeps_its_form() {
        assert_eq!(added("\n"), TEXT);
        let text = "{\n\t\"log-driver\":   \"local\",\n\t\"hosts\": [ \"fd://\" ]\n}";
        let after = added(text);
        assert!(
            after.starts_with(
                "{\n\t\"log-driver\":   \"local\",\n\t\"hosts\": [ \"fd://\" ],\n\t\"runtimes\""
            ),
            "{after}"
        );
        assert_eq!(runtime().remove(&after).unwrap(), text);
        let text = "{\"runtimes\": {\"runsc\": {\"path\": \"/r\"}}, \"debug\": true}";
        let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(value(&runtime().remove(&added(text)).unwrap()), value(text));
        added("{}");
        added("{ \"runtimes\": {} }");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let cases = [
            (
                "{ // a comment\n}",
                "/etc/docker/daemon.json does not parse: key must be a string at line 1 column 3",
            ),
            ("{\"a\": 1,}", "/etc/docker/daemon.json does not parse: trailing comma at line 1 column 9"),
            ("[]", "/etc/docker/daemon.json is not what Docker reads: the whole is not an object"),
            (
                "{\"runtimes\": 1}",
                "/etc/docker/daemon.json is not what Docker reads: \"runtimes\" is not an object",
            ),
            (
                "{\"runtimes\": {\"kata\": {\"path\": \"/k\"}}}",
                "/etc/docker/daemon.json has a runtime \"kata\" already, which is another one: {\"path\":\"/k\"}: \
                 remove it or give it another name",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(runtime().add(Some(text)).unwrap_err().to_string(), expected);
        }
    }
}
