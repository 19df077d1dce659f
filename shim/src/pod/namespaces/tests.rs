use super::*;
use serde_json::{Value, json};

const ORDINARY: [&str; 5] = ["pid", "ipc", "uts", "mount", "network"];

fn spec<V: Into<Value>>(namespaces: V, annotations: Value) -> Spec {
    let mut spec = json!({"linux": {}});
    spec["linux"]["namespaces"] = namespaces.into();
    spec["annotations"] = annotations;
    serde_json::from_value(spec).unwrap()
}

fn sandbox(namespaces: Vec<Value>) -> Spec {
    spec(namespaces, json!({"io.kubernetes.cri.container-type": "sandbox"}))
}

/// All of the ordinary ones, but for this kind what is given here, if anything.
fn with(kind: &str, instead: Option<&str>) -> Vec<Value> {
    let others = ORDINARY.iter().filter(|other| **other != kind).map(|other| json!({"type": other}));
    others.chain(instead.map(|path| json!({"type": kind, "path": path}))).collect()
}

fn names(asked: &Asked) -> Vec<&str> {
    asked.0.iter().map(|kind| kind.name).collect()
}

#[track_caller]
fn asked(mut spec: Spec) -> Vec<&'static str> {
    let asked = Asked::take(&mut spec, &Known::default()).unwrap();
    // What was named is not any more.
    let named = spec.linux.unwrap().namespaces;
    assert!(named.iter().all(|one| !names(&asked).contains(&one.kind.as_str())), "{named:?}");
    asked.0.iter().map(|kind| kind.name).collect()
}

#[track_caller]
fn refused(mut spec: Spec, known: &Known<'_>) -> String {
    Asked::take(&mut spec, known).unwrap_err().to_string()
}

#[test]
fn ordinary_containers_ask_for_nothing_of_the_hosts() {
    let none: [&str; 0] = [];
    // ctr, Docker with cgroup v1, privileged pods; then Docker and pods with cgroup v2; then what few have.
    for more in [&none[..], &["cgroup"], &["cgroup", "user", "time"]] {
        let kinds = ORDINARY.iter().chain(more);
        let namespaces: Vec<_> = kinds.map(|kind| json!({"type": kind, "path": ""})).collect();
        assert_eq!(asked(spec(namespaces, Value::Null)), none, "{more:?}");
    }
    assert_eq!(asked(spec(with("network", Some("/run/netns/x")), Value::Null)), none);
}

#[test]
fn what_is_not_listed_is_the_hosts() {
    for kind in ["pid", "ipc", "uts", "mount"] {
        assert_eq!(asked(spec(with(kind, None), Value::Null)), [kind]);
        assert_eq!(asked(sandbox(with(kind, None))), [kind]);
    }
    assert_eq!(asked(Spec::default()), ["pid", "ipc", "mount"]);
    // hostNetwork: what refuses the network has something better to say.
    let kinds = ["pid", "ipc", "mount"].map(|kind| json!({"type": kind}));
    assert!(asked(sandbox(kinds.to_vec())).is_empty());
}

#[test]
fn a_path_to_the_hosts_is_the_hosts() {
    let own = format!("/proc/{}/ns/uts", std::process::id());
    for path in ["/proc/self/ns/uts", "/proc/thread-self/ns/uts", own.as_str(), "/proc/../proc/self/ns/uts"] {
        assert_eq!(asked(spec(with("uts", Some(path)), Value::Null)), ["uts"], "{path}");
        assert_eq!(asked(sandbox(with("uts", Some(path)))), ["uts"], "{path}");
    }
    for kind in ["pid", "ipc"] {
        assert_eq!(asked(spec(with(kind, Some(&format!("/proc/self/ns/{kind}"))), Value::Null)), [kind]);
    }
}

#[test]
fn namespaces_of_others_are_refused() {
    let known = Known::default();
    let gone = refused(spec(with("ipc", Some("/proc/0/ns/ipc")), Value::Null), &known);
    assert_eq!(gone, "ipc namespace /proc/0/ns/ipc: No such file or directory");
    // Not of the right kind, and so neither the host's nor the pod's.
    let other = refused(spec(with("ipc", Some("/proc/self/ns/uts")), Value::Null), &known);
    assert!(other.starts_with("ipc namespace /proc/self/ns/uts: it is not of this pod"), "{other}");
    for kind in ["mount", "cgroup", "time"] {
        let path = format!("/proc/self/ns/{}", if kind == "mount" { "mnt" } else { kind });
        let why = refused(spec(with(kind, Some(&path)), Value::Null), &known);
        assert!(why.starts_with(&format!("{kind} namespace {path}: it is not of this pod")), "{why}");
    }
    let users = "the user namespace of a pod (hostUsers: false) is not supported: it needs id-mapped mounts";
    let joined = with("user", Some("/proc/self/ns/user"));
    assert_eq!(refused(spec(joined.clone(), Value::Null), &known), users);
    assert_eq!(refused(sandbox(joined), &known), users);
    assert_eq!(refused(sandbox([with("user", None), vec![json!({"type": "user"})]].concat()), &known), users);
}

#[test]
fn those_of_the_pod_are_joined() {
    // As containerd has them: of the pod's processes, which are not looked at.
    let pids = [4_000_001, 4_000_002];
    let known = Known { sandbox: None, pids: &pids };
    let path = |pid: u32, kind: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{kind}")});
    let mut member = spec(
        vec![path(pids[0], "ipc"), path(pids[0], "uts"), path(pids[1], "pid"), json!({"type": "mount"})],
        Value::Null,
    );
    assert_eq!(Asked::take(&mut member, &known).unwrap(), Asked::default());
    assert_eq!(member.linux.unwrap().namespaces.len(), 4);
    // As CRI-O has them: files. This one is no namespace, but neither is it the host's.
    let file = "/proc/self/exe";
    let mut pods = sandbox(with("uts", Some(file)));
    assert_eq!(Asked::take(&mut pods, &Known::default()).unwrap(), Asked::default());
    let known = Known { sandbox: Some(&pods), pids: &[] };
    assert_eq!(
        Asked::take(&mut spec(with("uts", Some(file)), Value::Null), &known).unwrap(),
        Asked::default()
    );
    assert!(refused(spec(with("ipc", Some(file)), Value::Null), &known).contains("not of this pod"));
}

#[test]
fn the_configuration_decides() {
    let asked = |mut spec: Spec| Asked::take(&mut spec, &Known::default()).unwrap();
    let pid = asked(sandbox(with("pid", None)));
    let why = pid.resolve(HostNamespaces::Refuse).unwrap_err().to_string();
    assert!(why.contains("the host's pid namespace") && why.contains("hostPID"), "{why}");
    assert!(why.contains("runtimeClassName") && why.contains("host_namespaces = \"guest\""), "{why}");
    assert!(pid.resolve(HostNamespaces::Guest).is_ok());
    assert!(Asked::default().resolve(HostNamespaces::Refuse).is_ok());
}
