//! Files and annotations of Kata Containers.

use std::collections::BTreeMap;
use std::path::Path;

use super::{FILE, Folder, parse};
use crate::classes::other_vmm;
use crate::kata::{ANNOTATIONS, Fate, TABLE, VMM, VMM_FACTORY, VMMS};
use crate::keys::{KEYS, TRANSLATED, host_cpus};
use crate::value::Value;
use crate::{Class, Config, Error, Hypervisor, examine};

/// The values of files as an installation of Kata Containers 4 has them.
const STOCK: [(&str, &str); 7] = [
    ("clh", include_str!("stock/clh.toml")),
    ("cloud-hypervisor", include_str!("stock/cloud-hypervisor.toml")),
    ("dragonball", include_str!("stock/dragonball.toml")),
    ("fc", include_str!("stock/fc.toml")),
    ("qemu", include_str!("stock/qemu.toml")),
    ("qemu-runtime-rs", include_str!("stock/qemu-runtime-rs.toml")),
    ("stratovirt", include_str!("stock/stratovirt.toml")),
];
const TABLE_BEGINS: &str = "<!-- KATANA_WRITE=1 cargo test -p katana-config kata -->\n";
const TABLE_ENDS: &str = "<!-- end -->\n";

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string().replace(FILE, "F")
}

#[test]
fn each_stock_file_makes_a_machine_of_our_own_files() {
    let ours = Hypervisor::default();
    for (name, text) in STOCK {
        let config = parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let hypervisor = &config.hypervisor;
        assert_eq!(
            (&hypervisor.path, &hypervisor.kernel, &hypervisor.image),
            (&ours.path, &ours.kernel, &ours.image)
        );
        assert_eq!((hypervisor.default_vcpus, hypervisor.default_memory), (1, 2048), "{name}");
        assert!(!hypervisor.kernel_params.contains("console"), "{name}");
        assert!(config.agent.dial_timeout >= 45, "{name}");
        let listed = config.without_meaning_line().unwrap();
        assert!(listed.starts_with("keys of the configuration without a meaning here: ["), "{listed}");
        assert!(
            listed.contains("[hypervisor.") && listed.contains("path, ") && !listed.contains('\n'),
            "{listed}"
        );
    }
}

#[test]
fn a_report_has_each_key_of_a_file_in_its_class() {
    for (name, text) in STOCK {
        let folder = Folder::new(&format!("report-{name}"));
        let (report, _) = examine(&folder.write("stock.toml", text)).unwrap();
        assert!(report.problems.is_empty(), "{name}");
        let keys: Vec<_> =
            text.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect();
        assert_eq!(report.uses.iter().map(|used| &*used.key).collect::<Vec<_>>(), keys, "{name}");
        let lines = text.lines().zip(1..).filter(|(line, _)| line.contains(" = ")).map(|(_, number)| number);
        assert!(report.uses.iter().map(|used| used.place.line).eq(lines), "{name}");
        let class = |key| report.uses.iter().find(|used| used.key == key).map(|used| used.class);
        assert_eq!(class("default_memory"), Some(Class::Works), "{name}");
        assert_eq!(class("kernel"), Some(Class::NoMeaning), "{name}");
    }
}

#[test]
fn what_works_sets_our_keys() {
    let config = |text: &str| parse(text).unwrap();
    let set = config(
        "[hypervisor.qemu]\ndefault_vcpus = 1.5\ndefault_maxvcpus = 0\ndefault_memory = 700\n\
         disable_vhost_net = true\nkernel_params = \"console=ttyS1 root=/dev/vda1  quiet\"\n\
         [hypervisor.qemu.factory]\nenable_template = false\ntemplate_path = \"/run/vc/vm/template\"\n\
         [agent.kata]\ndial_timeout_ms = 10\nreconnect_timeout_ms = 90001\n",
    );
    let hypervisor = &set.hypervisor;
    assert_eq!((hypervisor.default_vcpus, hypervisor.default_maxvcpus), (2.min(host_cpus()), host_cpus()));
    assert_eq!((hypervisor.default_memory, hypervisor.disable_vhost_net), (700, true));
    assert_eq!(hypervisor.kernel_params, "quiet");
    assert_eq!((set.factory.enable_template, set.agent.dial_timeout), (false, 91));
    assert_eq!(set.factory.template_path, Path::new("/run/vc/vm/template"));
    assert_eq!(set.without_meaning_line(), None);
    // The time that Kata's agent needs is no reason to give ours less.
    assert_eq!(config("agent.kata.reconnect_timeout_ms = 3000").agent.dial_timeout, 60);
    for (value, vcpus) in
        [("-1", host_cpus()), ("-0.5", host_cpus()), ("0", 1), ("0.0", 1), ("0.1", 1), ("1e9", host_cpus())]
    {
        let config = config(&format!("[hypervisor.clh]\ndefault_vcpus = {value}"));
        assert_eq!(config.hypervisor.default_vcpus, vcpus, "{value}");
    }
    assert!(error("[hypervisor.clh]\ndefault_vcpus = nan").contains("must be a number"));
    // Our own sections win, wherever they are.
    let both = "[hypervisor.katana]\ndefault_memory = 300\n[factory]\nenable_template = true\n\
                [hypervisor.qemu]\ndefault_memory = 400\n\
                [hypervisor.qemu.factory]\nenable_template = false\n";
    assert_eq!((config(both).hypervisor.default_memory, config(both).factory.enable_template), (300, true));
}

#[test]
fn what_has_no_meaning_is_accepted_and_listed() {
    let config = parse(
        "[hypervisor.qemu]\npath = \"/usr/bin/qemu\"\nmachine_type = 7\n\
         [runtime]\nsandbox_cgroup_only = false\n\
         [agent.kata]\ndebug_console_enabled = true\nlog_level = 3\n[hypervisor.qemu.rootless_user]\nuid = 7\n",
    );
    let listed = "keys of the configuration without a meaning here: [agent.kata] log_level; \
                  [hypervisor.qemu] path, machine_type, rootless_user; [runtime] sandbox_cgroup_only";
    let config = config.unwrap();
    assert_eq!(config.without_meaning_line().as_deref(), Some(listed));
    assert_eq!((config.agent.debug_console_enabled, config.runtime.sandbox_cgroup_only), (true, true));
    assert_eq!(config.hypervisor, Hypervisor::default());
}

#[test]
fn what_must_not_be_ignored_is_refused_with_what_to_do() {
    for (text, why) in [
        (
            "[hypervisor.qemu]\nconfidential_guest = true",
            "F:2:22: key \"confidential_guest\" in [hypervisor.qemu] cannot be followed: guests are",
        ),
        (
            "[hypervisor.katana]\ninitrd = \"/i\"",
            "F:2:10: key \"initrd\" in [hypervisor.katana] cannot be followed: there is no initrd",
        ),
        ("[hypervisor.qemu]\nkernel_verity_params = \"root_hash=1\"", "F:2:24: key \"kernel_verity_params\""),
        (
            "[hypervisor.qemu]\nkernel_params = \"rootfs_verity.scheme=dm-verity\"",
            "F:2:17: key \"kernel_params\" in [hypervisor.qemu]: \"rootfs_verity.scheme=dm-verity\" cannot",
        ),
        ("[hypervisor.qemu]\nrootless = true", "F:2:12: key \"rootless\""),
        ("[hypervisor.qemu]\nshared_fs = \"none\"", "F:2:13: key \"shared_fs\""),
        ("[hypervisor.qemu]\ndisable_guest_selinux = false", "F:2:25: key \"disable_guest_selinux\""),
        (
            "[hypervisor.clh]\nnet_rate_limiter_bw_max_rate = 0x10",
            "F:2:32: key \"net_rate_limiter_bw_max_rate\"",
        ),
        (
            "[hypervisor.remote]\nremote_hypervisor_socket = \"/s\"",
            "F:2:28: key \"remote_hypervisor_socket\"",
        ),
        ("[[hypervisor.qemu.extra_images]]\nname = \"gpu\"", "F:1:19: key \"extra_images\""),
        ("[runtime]\nsandbox_bind_mounts = [\"/a\"]", "F:2:23: key \"sandbox_bind_mounts\""),
        ("[runtime]\ninternetworking_model = \"none\"", "F:2:25: key \"internetworking_model\""),
        ("[agent.kata]\nkernel_modules = [\"e1000e\"]", "F:2:18: key \"kernel_modules\""),
    ] {
        assert!(error(text).starts_with(why), "{}", error(text));
    }
    let both = "[hypervisor.clh]\ndefault_memory = 300\n[hypervisor.qemu]\ndefault_memory = 400";
    let why = "F:3:13: [hypervisor.qemu] is of another VMM than [hypervisor.clh]: keep one of them";
    assert_eq!(error(both), why);
}

#[test]
fn all_errors_are_said_at_once() {
    let text =
        "[runtime]\nenable_debgu = true\n  experimental = [\"x\"]\n[agent.kata]\ndial_timeout = \"é\"; x\n";
    assert_eq!(error(text).lines().count(), 1, "{}", error(text));
    let text = "[runtime]\nenable_debgu = true\n  experimental = [\"x\"]\n[agent.kta]\nx = 1\n[agent.kata]\n\
                enable_debug = 1\nruntime.dial_timeout = 1\ndefault_vcpus = 3\n";
    let why = [
        "F:2:1: unknown key \"enable_debgu\" in [runtime]; did you mean \"enable_debug\"?",
        "F:3:18: key \"experimental\" in [runtime] cannot be followed: there are no experimental features: \
         remove what is listed",
        "F:4:8: unknown section [agent.kta]; did you mean [agent.kata]?",
        "F:7:16: key \"enable_debug\" in [agent.kata]: must be true or false, not an integer",
        "F:8:1: unknown key \"runtime\" in [agent.kata]",
        "F:9:1: unknown key \"default_vcpus\" in [agent.kata]; did you mean \"default_vcpus\" in \
         [hypervisor.katana]?",
    ];
    assert_eq!(error(text), why.join("\n"));
    // Characters are counted, not bytes; the parser's own errors are said at once as well.
    assert!(error("# é\n\"é\".a = 1").starts_with("F:2:1: "), "{}", error("# é\n\"é\".a = 1"));
    assert!(error("\"é\" = {  }, a").starts_with("F:1:11: not valid TOML"), "{}", error("\"é\" = {  }, a"));
    assert_eq!(error("a = \nb = \n").lines().count(), 2);
    // Of a file and its drop-ins.
    let folder = Folder::new("at-once");
    let file = folder.write("configuration.toml", "[runtime]\nx = 1\n");
    folder.write("config.d/1.toml", "[runtime]\ny = 1\n");
    let Err(Error::Wrong(problems)) = crate::load(Some(&file)) else { panic!("accepted") };
    assert_eq!(problems.len(), 2);
}

#[test]
fn a_similar_name_is_suggested_and_no_other() {
    for (text, meant) in [
        ("[hypervisor.qemu]\nmachine_typ = \"\"", Some("\"machine_type\"")),
        ("[hypervisor.katana]\ndefault_memroy = 1", Some("\"default_memory\"")),
        ("[hypervisor.qemu]\ndisk_slots = 1", Some("\"disk_slots\" in [hypervisor.katana]")),
        ("[hypervisor.katana.factory]\ntemplate_paht = 1", Some("\"template_path\"")),
        ("[agent.kata.mem_agent]\nmemcg_swapp = 1", Some("\"memcg_swap\"")),
        ("[hypervisor.fire_cracker]\na = 1", Some("[hypervisor.firecracker]")),
        ("[factori]\na = 1", Some("[factory]")),
        ("[runtime]\nquite_another_thing = 1", None),
        ("[something]\na = 1", None),
        ("[runtime]\npat = 1", None),
    ] {
        let error = error(text);
        let suggested = error.split_once("; did you mean ").map(|(_, rest)| rest.trim_end_matches('?'));
        assert_eq!(suggested, meant, "{error}");
    }
    assert!(
        error("[runtime]\ndial_timeout = 1").ends_with("; did you mean \"dial_timeout\" in [agent.kata]?")
    );
    let long = "x".repeat(100_000);
    assert!(!error(&format!("[runtime]\n{long} = 1")).contains("did you mean"));
}

fn annotate(list: &[(&str, &str)]) -> Result<(Config, Vec<String>), String> {
    let named =
        |(name, value): &(&str, &str)| (format!("io.katacontainers.config.{name}"), (*value).to_owned());
    let config =
        parse("hypervisor.katana.enable_annotations = [\"default_vcpus\", \"default_max_vcpus\"]").unwrap();
    let annotations: BTreeMap<_, _> = list.iter().map(named).collect();
    config.annotated(&annotations).map_err(|error| error.to_string())
}

#[test]
fn annotations_without_a_meaning_do_not_stop_a_pod() {
    let list = [
        ("agent.enable_tracing", "true"),
        ("hypervisor.enable_hugepages", "true"),
        ("hypervisor.firmware", "/f"),
        ("hypervisor.rx_rate_limiter_max_rate", "0"),
        ("hypervisor.use_vsock", "true"),
        ("runtime.create_container_timeout", "9"),
        ("runtime.disable_guest_seccomp", "false"),
        ("runtime.enable_debug", "true"),
    ];
    let (config, lines) = annotate(&list).unwrap();
    assert_eq!(config, annotate(&[]).unwrap().0);
    let names = |line: &String| line.split(' ').nth(1).unwrap().replace("io.katacontainers.config.", "");
    assert_eq!(lines.iter().map(names).collect::<Vec<_>>(), list.map(|(name, _)| name));
    let line =
        "annotation io.katacontainers.config.agent.enable_tracing has no meaning here: there are no traces";
    assert_eq!(lines[0], line);
    let (same, lines) =
        annotate(&[("hypervisor.enable_debug", "true"), ("hypervisor.disk_slots", "2")]).unwrap();
    assert_eq!(same, config);
    assert!(
        lines[1].contains("enable_debug is ignored: \"enable_debug\" is not in enable_annotations of"),
        "{lines:?}"
    );
    let (config, lines) =
        annotate(&[("hypervisor.default_vcpus", "1.5"), ("hypervisor.default_max_vcpus", "0")]).unwrap();
    assert_eq!((config.hypervisor.default_vcpus, lines.len()), (2.min(host_cpus()), 0));
}

#[test]
fn annotations_that_must_not_be_ignored_stop_a_pod() {
    for (name, value) in [
        ("agent.kernel_modules", "e1000e"),
        ("agent.policy", "cGFja2FnZQ=="),
        ("hypervisor.cc_init_data", "eJw"),
        ("hypervisor.image_hash", "0a"),
        ("hypervisor.initrd", "/i"),
        ("hypervisor.rootless", "true"),
        ("hypervisor.rx_rate_limiter_max_rate", "1000"),
        ("hypervisor.shared_fs", "none"),
        ("runtime.experimental_force_guest_pull", "true"),
        ("runtime.sandbox_bind_mounts", "/etc"),
    ] {
        let error = annotate(&[(name, value)]).unwrap_err();
        let begin = format!("annotation io.katacontainers.config.{name}: it cannot be followed: ");
        assert!(error.starts_with(&begin), "{error}");
    }
    // What a pod asks for and may not have is not left out either.
    for name in ["hypervisor.default_memory", "hypervisor.kernel"] {
        assert!(annotate(&[(name, "1000")]).is_err(), "{name}");
    }
}

#[test]
fn the_table_is_consistent() {
    let mut seen = std::collections::BTreeSet::new();
    for group in TABLE {
        assert!(!group.remark.is_empty() || group.fate == Fate::Works, "{:?}", group.names);
        for name in group.names {
            assert!(seen.insert((group.section, *name)), "{name} twice in {}", group.section);
            let of = |key: &&crate::keys::Key| key.name == *name;
            let ours = match group.section {
                VMM => "hypervisor.katana",
                VMM_FACTORY => "factory",
                other => other,
            };
            let key = TRANSLATED
                .iter()
                .map(|(key, _)| key)
                .chain(KEYS.iter().filter(|key| key.section == ours))
                .find(of);
            if matches!(group.fate, Fate::Works | Fate::WorksBut(_)) {
                assert!(key.is_some(), "{name} sets nothing");
            }
        }
    }
    assert!(VMMS.iter().all(|vmm| other_vmm(&format!("hypervisor.{vmm}.factory")) == Some(vmm)));
}

/// The table as the document has it.
fn table() -> String {
    let mut text = "\n| section | keys | here | remark |\n|---|---|---|---|\n".to_owned();
    for group in TABLE {
        let section = match group.section {
            ANNOTATIONS => "annotations".to_owned(),
            section => format!("`[{}]`", section.replace('*', "VMM")),
        };
        let fate = match group.fate {
            Fate::Works => "works".to_owned(),
            Fate::WorksBut(value) => format!("works; no meaning if {}", named(value)),
            Fate::Nothing => "no meaning".to_owned(),
            Fate::Refused(value) => format!("no meaning; refused if {}", named(value)),
        };
        let names = group.names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        text += &format!("| {section} | {names} | {fate} | {} |\n", group.remark);
    }
    text + "\n"
}

fn named(value: Value) -> String {
    match value {
        Value::Set => "set".to_owned(),
        Value::Is(value) => format!("`{value}`"),
        Value::Text(text) => format!("`\"{text}\"`"),
    }
}

#[test]
fn the_document_has_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(TABLE_BEGINS).unwrap();
    let (is, after) = rest.split_once(TABLE_ENDS).unwrap();
    if std::env::var_os("KATANA_WRITE").is_some() {
        return std::fs::write(&path, format!("{before}{TABLE_BEGINS}{}{TABLE_ENDS}{after}", table()))
            .unwrap();
    }
    assert!(is == table(), "docs/configuration.md is to be written anew: {TABLE_BEGINS}");
}
