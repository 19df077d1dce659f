//! Which files of a crate use which others. There are no circles, and in the shim the rooms have an order: see
//! ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The shim's rooms. Each may use those after it.
const ROOMS: [&str; 11] = [
    "command",
    "containerd",
    "manage",
    "pod",
    "machine",
    "network",
    "guest",
    "storage",
    "spec",
    "host",
    "error",
];

/// By the path of each module, such as `pod::stdio`, the modules that it uses.
type Uses = BTreeMap<String, BTreeSet<String>>;

fn uses_of(crate_name: &str) -> Uses {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(crate_name).join("src");
    let mut texts = BTreeMap::new();
    read(&source, &[], &mut texts);
    assert!(!texts.is_empty(), "{} has no modules", source.display());
    texts.iter().map(|(module, text)| (module.clone(), uses(module, text, &texts))).collect()
}

/// The text of each module below a directory, without its tests and comments.
fn read(directory: &Path, path: &[&str], texts: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display())) {
        let place = entry.expect("an entry").path();
        let name = place.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
        if name.ends_with("tests") {
            continue;
        }
        let inner = [path, &[name.as_str()]].concat();
        if place.is_dir() {
            read(&place, &inner, texts);
        } else if place.extension().is_some_and(|end| end == "rs") {
            let module = if matches!(&*name, "mod" | "lib" | "main") { path } else { &inner[..] };
            let text = fs::read_to_string(&place).expect("a source file");
            let code = without_tests(&text);
            let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
            texts.insert(module.join("::"), lines.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// A source file without its modules of tests: a line, or a block that ends with a brace at the beginning of a line.
fn without_tests(text: &str) -> String {
    let (mut code, mut rest) = (String::new(), text);
    while let Some((before, module)) = rest.split_once("#[cfg(test)]\nmod ") {
        code.push_str(before);
        let is_block = module.lines().next().is_some_and(|line| line.ends_with('{'));
        rest = module.split_once(if is_block { "\n}\n" } else { "\n" }).map_or("", |(_, rest)| rest);
    }
    code + rest
}

fn uses(module: &str, text: &str, all: &BTreeMap<String, String>) -> BTreeSet<String> {
    let own: Vec<_> = module.split("::").filter(|name| !name.is_empty()).collect();
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("crate::").chain(text.match_indices("super::")) {
        // The second of `super::super::` is read with the first.
        if text[..at].ends_with("super::") || text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
        {
            continue;
        }
        let mut rest = &text[at..];
        let mut start = own.clone();
        if let Some(after) = rest.strip_prefix("crate::") {
            (rest, start) = (after, Vec::new());
        }
        while let Some(after) = rest.strip_prefix("super::") {
            start.pop();
            rest = after;
        }
        for path in paths(rest) {
            let mut names: Vec<_> = start.iter().copied().chain(path.split("::")).collect();
            while !names.is_empty() && !all.contains_key(&names.join("::")) {
                names.pop();
            }
            let target = names.join("::");
            let related = |a: &str, b: &str| a == b || a.starts_with(&format!("{b}::"));
            if !target.is_empty() && !related(&target, module) && !related(module, &target) {
                found.insert(target);
            }
        }
    }
    found
}

/// The paths at the beginning of a text: `a::b`, or each of `{a::b, c}`.
fn paths(text: &str) -> Vec<&str> {
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let first = |text| str::split(text, move |c| !is_path(c)).next().unwrap_or_default();
    match text.strip_prefix('{') {
        None => vec![first(text)],
        Some(group) => {
            group.split('}').next().unwrap_or_default().split(',').map(|part| first(part.trim())).collect()
        }
    }
}

/// A way from a module back to itself.
fn circle(uses: &Uses) -> Option<Vec<&str>> {
    fn walk<'a>(uses: &'a Uses, way: &mut Vec<&'a str>, done: &mut BTreeSet<&'a str>) -> bool {
        let last = *way.last().expect("a beginning");
        for next in uses.get(last).into_iter().flatten() {
            let begun = way.iter().position(|module| module == next);
            way.push(next);
            if let Some(begun) = begun {
                way.drain(..begun);
                return true;
            }
            if !done.contains(next.as_str()) && walk(uses, way, done) {
                return true;
            }
            way.pop();
        }
        done.insert(last);
        false
    }
    let mut done = BTreeSet::new();
    uses.keys().find_map(|module| {
        let mut way = vec![module.as_str()];
        walk(uses, &mut way, &mut done).then_some(way)
    })
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    for name in [
        "agent", "archive", "config", "fuzz", "metrics", "monitor", "pods", "protocol", "runtime", "shim",
        "template", "vmm",
    ] {
        let uses = uses_of(name);
        assert_eq!(circle(&uses), None, "in {name}/src");
    }
}

#[test]
fn rooms_of_the_shim_use_those_below() {
    let place = |module: &str| {
        let room = module.split("::").next().unwrap_or_default();
        ROOMS.iter().position(|known| *known == room).unwrap_or_else(|| panic!("{module} is in no room"))
    };
    for (module, used) in uses_of("shim").iter().filter(|(module, _)| !module.is_empty()) {
        for other in used {
            assert!(place(module) <= place(other), "{module} uses {other}, which is above it");
        }
    }
}

#[test]
fn only_tests_are_left_out() {
    let text = "a\n#[cfg(test)]\nmod b;\nc\n#[cfg(test)]\nmod d {\n    {\n    }\n}\ne\n#[cfg(test)]\nmod f;";
    assert_eq!(without_tests(text), "a\nc\ne\n");
}

#[test]
fn what_is_used_is_found() {
    let all = ["a", "a::b", "c", "c::d"].map(|module| (module.to_owned(), String::new())).into();
    let found = |text| uses("a::b", text, &all).into_iter().collect::<Vec<_>>();
    assert_eq!(found("use crate::c::d::E; use super::super::c; mycrate::a"), ["c", "c::d"]);
    assert_eq!(found("use crate::{c::{self, F}, a};"), ["c"]);
    assert_eq!(found("use super::X; use self::y;"), [""; 0]);
    let circles = |pairs: &[(&str, &str)]| {
        let pair = |(a, b): &(&str, &str)| ((*a).to_owned(), BTreeSet::from([(*b).to_owned()]));
        circle(&pairs.iter().map(pair).collect()).map(|way| way.join(" "))
    };
    assert_eq!(circles(&[("a", "b"), ("b", "c")]), None);
    assert_eq!(circles(&[("a", "b"), ("b", "c"), ("c", "b")]).as_deref(), Some("b c b"));
}
