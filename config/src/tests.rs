mod kata;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::file::Loader;
use crate::keys::{KEYS, host_cpus, host_memory};
use crate::trusted::Links;
use crate::{Agent, CONFIG_PATH, Config, Error, Factory, Hypervisor, Runtime, load, load_first};

const FILE: &str = "/etc/kata-containers/configuration.toml";
const SHIPPED: &str = include_str!("../configuration.toml");

fn parse(text: &str) -> Result<Config, Error> {
    let mut loader = Loader::new(Path::new(FILE), Links::Follow);
    loader.apply_text(Path::new(FILE), text);
    loader.finish()
}

fn defaults() -> Config {
    Config {
        path: PathBuf::from(FILE),
        hypervisor: Hypervisor::default(),
        agent: Agent::default(),
        factory: Factory::default(),
        runtime: Runtime::default(),
        without_meaning: Vec::new(),
    }
}

/// A folder of its own for a test, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("katana-config-{}-{name}", std::process::id()));
        fs::create_dir_all(path.join("config.d")).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn errors_name_file_line_column_and_key() {
    let cases = [
        ("[hypervisor.katana]\n\nfoo = 1", "3:1: unknown key \"foo\" in [hypervisor.katana]"),
        (
            "# a\n[hypervisor.qemmu]\npath = \"/q\"",
            "2:13: unknown section [hypervisor.qemmu]; did you mean [hypervisor.qemu]?",
        ),
        (
            "\n[factory]\nenable_templates = true",
            "3:1: unknown key \"enable_templates\" in [factory]; did you mean \"enable_template\"?",
        ),
        ("[runtime.x]\na = 1", "1:10: unknown key \"x\" in [runtime]"),
        ("debug = true", "1:1: unknown key \"debug\" in the top level"),
        ("hypervisor = 3", "1:1: unknown key \"hypervisor\" in the top level"),
        ("[[runtime]]\nenable_debug = true", "1:3: unknown key \"runtime\" in the top level"),
        (
            "[runtime]\nenable_debug = 1",
            "2:16: key \"enable_debug\" in [runtime]: must be true or false, not an integer",
        ),
        (
            "[hypervisor.katana]\ndefault_vcpus = \"2\"",
            "2:17: key \"default_vcpus\" in [hypervisor.katana]: must be an integer, not a string",
        ),
        (
            "[hypervisor.katana]\ndefault_memory = 32",
            "2:18: key \"default_memory\" in [hypervisor.katana]: must be from 64 to 1048576, not 32",
        ),
        (
            "[hypervisor.katana]\ndefault_memory = 99999999999999999999",
            "2:18: key \"default_memory\" in [hypervisor.katana]: is too large",
        ),
        (
            "[hypervisor.katana]\ndefault_maxvcpus = -1",
            "2:20: key \"default_maxvcpus\" in [hypervisor.katana]: must be 0 or more, not -1",
        ),
        (
            "[hypervisor.katana]\nkernel = \"vmlinux\"",
            "2:10: key \"kernel\" in [hypervisor.katana]: must be an absolute path, not \"vmlinux\"",
        ),
        (
            "[hypervisor.katana]\nkernel_params = \"a\\nb\"",
            "2:17: key \"kernel_params\" in [hypervisor.katana]: must be printable ASCII characters; '\\n' is not one",
        ),
        (
            "[agent.kata]\ndebug_console_enabled = \"yes\"",
            "2:25: key \"debug_console_enabled\" in [agent.kata]: must be true or false, not a string",
        ),
        (
            "[runtime]\nsandbox_cgroup_only = 1",
            "2:23: key \"sandbox_cgroup_only\" in [runtime]: must be true or false, not an integer",
        ),
        (
            "[runtime]\nhost_namespaces = \"share\"",
            "2:19: key \"host_namespaces\" in [runtime]: must be \"refuse\" or \"guest\", not \"share\"",
        ),
        (
            "[factory]\ntemplate_scope = \"pod\"",
            "2:18: key \"template_scope\" in [factory]: must be \"host\" or \"namespace\", not \"pod\"",
        ),
        (
            "[agent.kata]\ndial_timeout = 0",
            "2:16: key \"dial_timeout\" in [agent.kata]: must be from 1 to 3600, not 0",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(parse(text).unwrap_err().to_string(), format!("{FILE}:{expected}"), "{text}");
    }
}

#[test]
fn syntax_errors_name_the_line() {
    for (text, line) in [("[runtime]\nenable_debug =\n", 2), ("\n\n[runtime\n", 3), ("a = 1\na = 2\n", 2)] {
        let error = parse(text).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{FILE}:{line}:")) && error.contains(": not valid TOML: "),
            "{error}"
        );
    }
}

#[test]
fn vcpus_mean_what_they_mean_in_kata() {
    let vcpus = |value: &str| {
        let hypervisor = parse(&format!("[hypervisor.katana]\ndefault_vcpus = {value}")).unwrap().hypervisor;
        hypervisor.default_vcpus
    };
    assert_eq!((vcpus("0"), vcpus("1")), (1, 1));
    assert_eq!(
        (vcpus("-1"), vcpus("4000000000"), vcpus("0xFFFFFFFFFFF")),
        (host_cpus(), host_cpus(), host_cpus())
    );
    let most = |value: &str| parse(&format!("hypervisor.katana.default_maxvcpus = {value}"));
    assert_eq!(most("0").unwrap().hypervisor.default_maxvcpus, host_cpus());
    assert_eq!(most("1").unwrap().hypervisor.default_maxvcpus, 1);
}

#[test]
fn the_most_memory_is_the_hosts_and_never_below_the_base() {
    let most =
        |text: &str| parse(&format!("[hypervisor.katana]\n{text}")).unwrap().hypervisor.default_maxmemory;
    assert_eq!(most("default_maxmemory = 0"), host_memory());
    assert_eq!(most("default_maxmemory = 16777216"), host_memory());
    assert_eq!(most("default_maxmemory = 600"), 600);
    assert_eq!(most("default_maxmemory = 100\ndefault_memory = 300"), 300);
}

#[test]
fn a_pod_sets_what_it_may_set() {
    let text = "hypervisor.katana.enable_annotations = [\"default_.*\", \"kernel_params\"]";
    let annotate = |list: &[(&str, &str)]| {
        let named = |(name, value): &(&str, &str)| (format!("io.katacontainers.{name}"), (*value).to_owned());
        parse(text).unwrap().annotated(&list.iter().map(named).collect()).map(|(config, _)| config)
    };
    let config = annotate(&[
        ("config.hypervisor.default_memory", "900"),
        ("config.hypervisor.default_max_vcpus", "1"),
        ("config.hypervisor.kernel_params", "a=\"1\" true"),
        ("config_path", "/x"),
        ("other", "1"),
    ]);
    let hypervisor = config.unwrap().hypervisor;
    assert_eq!((hypervisor.default_memory, hypervisor.default_maxvcpus), (900, 1));
    assert_eq!(hypervisor.kernel_params, "a=\"1\" true");
    for (name, value, why) in [
        ("config.hypervisor.default_memory", "much", "must be an integer, not a string"),
        ("config.hypervisor.default_memory", "1", "must be from 64 to 1048576, not 1"),
        ("config.hypervisor.default_memory", "1]\n[", "must be an integer, not a string"),
        ("config.hypervisor.default_memory", "1048576", "1048576 is more than default_maxmemory, which is "),
        (
            "config.hypervisor.writable_layer_size",
            "64",
            "\"writable_layer_size\" is not in enable_annotations of",
        ),
        ("config.hypervisor.kernel", "/etc/passwd", "this key cannot be set by annotations"),
        ("config.hypervisor.enable_annotations", "x", "this key cannot be set by annotations"),
        ("config.hypervisor.no_such", "1", "there is no such key"),
        ("config.hypervisor.default_memroy", "1", "there is no such key; did you mean \"default_memory\"?"),
        ("config.sev.policy", "1", "there is no such key"),
        ("config.", "true", "there is no such key"),
    ] {
        let error = annotate(&[(name, value)]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("annotation io.katacontainers.{name}: {why}")), "{error}");
    }
    let error = parse("hypervisor.katana.enable_annotations = [\"(\"]").unwrap_err().to_string();
    assert!(error.contains("\"(\" is not a regular expression"), "{error}");
}

#[test]
fn the_kernels_parameters_are_not_a_pods_to_set_unless_the_file_says_so() {
    let parameters =
        ("io.katacontainers.config.hypervisor.kernel_params".to_owned(), "agent.log=debug".into());
    let annotations = [parameters].into();
    let error = parse("").unwrap().annotated(&annotations).unwrap_err().to_string();
    assert!(error.contains("\"kernel_params\" is not in enable_annotations of"), "{error}");
    let allowed = parse("hypervisor.katana.enable_annotations = [\"kernel_params\"]").unwrap();
    assert_eq!(allowed.annotated(&annotations).unwrap().0.hypervisor.kernel_params, "agent.log=debug");
}

#[test]
fn a_pod_chooses_among_the_files_that_are_there_for_it() {
    let folder = Folder::new("choice");
    let (path, name) = (folder.0.display().to_string(), CONFIG_PATH.to_owned());
    fs::create_dir(folder.0.join("pods")).unwrap();
    let file = folder.write("pods/large.toml", "[hypervisor.katana]\ndefault_memory = 900\n");
    let outside = folder.write("outside.toml", "");
    std::os::unix::fs::symlink(&outside, folder.0.join("pods/link.toml")).unwrap();
    let choose = |directories: &str, asked: &str| {
        let text = format!("runtime.config_path_directories = {directories}");
        parse(&text).unwrap().chosen(&[(name.clone(), asked.to_owned())].into())
    };
    let allowed = format!("[\"{path}/other\", \"{path}/pods/\"]");
    assert_eq!(choose(&allowed, file.to_str().unwrap()).unwrap().hypervisor.default_memory, 900);
    // Without the annotation nothing is chosen.
    assert_eq!(parse("").unwrap().chosen(&[].into()).unwrap(), defaults());
    let refused = |directories: &str, asked: &str| choose(directories, asked).unwrap_err().to_string();
    let why = refused("[]", file.to_str().unwrap());
    assert!(why.starts_with("annotation io.katacontainers.config_path: pods may not choose"), "{why}");
    for asked in [
        outside.display().to_string(),
        format!("{path}/pods"),
        format!("{path}/pods/../outside.toml"),
        format!("{path}/pods-of-mine/large.toml"),
        "pods/large.toml".to_owned(),
        String::new(),
    ] {
        let why = refused(&allowed, &asked);
        assert!(why.contains("is not below one of config_path_directories"), "{asked}: {why}");
    }
    let why = refused(&allowed, &format!("{path}/pods/link.toml"));
    assert!(why.ends_with("pods/link.toml\" is a symbolic link"), "{why}");
    fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
    let why = refused(&allowed, file.to_str().unwrap());
    assert!(why.ends_with("can be written to by others than root (mode 0666)"), "{why}");
}

#[test]
fn more_vcpus_than_the_most_is_an_error() {
    if host_cpus() < 2 {
        return;
    }
    let error =
        parse("[hypervisor.katana]\ndefault_maxvcpus = 1\ndefault_vcpus = 2\n").unwrap_err().to_string();
    let why =
        "3:17: key \"default_vcpus\" in [hypervisor.katana]: 2 is more than default_maxvcpus, which is 1";
    assert_eq!(error, format!("{FILE}:{why}"));
}

#[test]
fn drop_ins_override_in_the_order_of_their_names() {
    let folder = Folder::new("drop-ins");
    let file = folder.write("configuration.toml", "[agent.kata]\ndial_timeout = 1\nenable_debug = true\n");
    folder.write("config.d/20-second.toml", "[agent.kata]\ndial_timeout = 3\n");
    folder
        .write("config.d/10-first.toml", "[agent.kata]\ndial_timeout = 2\n[runtime]\nenable_debug = true\n");
    folder.write("config.d/30-other.txt", "not toml");
    let config = load(Some(&file)).unwrap();
    assert_eq!(
        (config.agent.dial_timeout, config.agent.enable_debug, config.runtime.enable_debug),
        (3, true, true)
    );
    assert_eq!(config.path, file);

    let bad = folder.write("config.d/40-bad.toml", "\n[agent.kata]\nfoo = 2\n");
    let error = load(Some(&file)).unwrap_err().to_string();
    assert_eq!(error, format!("{}:3:1: unknown key \"foo\" in [agent.kata]", bad.display()));
}

#[test]
fn the_first_file_that_exists_is_used_even_if_it_is_bad() {
    let folder = Folder::new("search");
    let good = folder.write("good.toml", "[agent.kata]\ndial_timeout = 9\n");
    let bad = folder.write("bad.toml", "[agent.kata]\ndial_timeout = 0\n");
    let missing = folder.0.join("missing.toml");
    assert_eq!(load_first(&[missing.clone(), good.clone()]).unwrap().agent.dial_timeout, 9);
    assert!(matches!(load_first(&[bad, good]), Err(Error::Wrong(_))));
    let error = load_first(std::slice::from_ref(&missing)).unwrap_err().to_string();
    assert_eq!(error, format!("no configuration file: {} do not exist", missing.display()));
}

#[test]
fn what_is_no_file_is_refused() {
    for path in ["/dev/zero", "/nonexistent/configuration.toml", "/etc"] {
        let error = load(Some(Path::new(path))).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{path}: cannot read the configuration: ")), "{error}");
    }
}

#[test]
fn the_shipped_file_sets_the_defaults() {
    assert_eq!(parse(SHIPPED).unwrap(), defaults());
}

#[test]
fn the_shipped_file_shows_each_key() {
    // What is commented out is a key as well: "#enable_debug = true".
    let uncommented: String = SHIPPED
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let mut loader = Loader::new(Path::new(FILE), Links::Follow);
    loader.apply_text(Path::new(FILE), &uncommented);
    let mut expected: Vec<_> = KEYS.iter().map(|key| (key.section, key.name)).collect();
    expected.sort_unstable();
    assert_eq!(loader.set_keys(), expected);
}

#[test]
fn fuzz_configuration() {
    katana_fuzz::fuzz("configuration", |input| {
        let text = String::from_utf8_lossy(input.rest());
        let _ = parse(&text).map_err(|error| error.to_string());
    });
}

/// A pod may set all keys that it can set at all.
#[test]
fn fuzz_annotations() {
    let config = parse("[hypervisor.katana]\nenable_annotations = [\".*\"]").unwrap();
    katana_fuzz::fuzz("annotations", |input| {
        let mut annotations = std::collections::BTreeMap::new();
        while !input.is_empty() {
            let key = if input.once_in(4) {
                let length = input.below(32);
                String::from_utf8_lossy(input.bytes(length)).into_owned()
            } else {
                KEYS[input.below(KEYS.len())].name.to_owned()
            };
            let length = input.below(64);
            let value = String::from_utf8_lossy(input.bytes(length)).into_owned();
            annotations.insert(format!("io.katacontainers.config.hypervisor.{key}"), value);
        }
        let Ok((set, _)) = config.clone().annotated(&annotations) else { return };
        // Whatever a pod says, it does not choose what runs on the host.
        assert_eq!(set.hypervisor.path, config.hypervisor.path);
        assert_eq!(
            (&set.hypervisor.kernel, &set.hypervisor.image),
            (&config.hypervisor.kernel, &config.hypervisor.image)
        );
        assert_eq!(set.hypervisor.enable_annotations, config.hypervisor.enable_annotations);
    });
}
