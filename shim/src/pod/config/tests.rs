use super::*;
use katana_protocol::pod::{
    LinuxContainerResources, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxMetadata, UserNamespace,
};
use protobuf::well_known_types::any::Any;

fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
    let value = config.write_to_bytes().unwrap();
    CreateSandboxRequest {
        sandbox_id: "pod".into(),
        netns_path: "/run/netns/cni-1".into(),
        options: Some(Any { type_url: CONFIG_TYPE.into(), value, ..Default::default() }).into(),
        ..Default::default()
    }
}

fn config() -> PodSandboxConfig {
    let dns = DNSConfig {
        servers: vec!["10.0.0.10".into(), "fd00::10".into()],
        searches: vec!["a.example".into(), "b.example".into()],
        options: vec!["ndots:5".into()],
        ..Default::default()
    };
    let resources = LinuxContainerResources { cpu_period: 100_000, cpu_quota: 150_000, ..Default::default() };
    let linux = LinuxPodSandboxConfig {
        cgroup_parent: "/kubepods/pod1".into(),
        sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
        resources: Some(resources).into(),
        ..Default::default()
    };
    let metadata = PodSandboxMetadata { namespace: "shop".into(), ..Default::default() };
    PodSandboxConfig {
        metadata: Some(metadata).into(),
        hostname: "web-0".into(),
        dns_config: Some(dns).into(),
        annotations: [
            ("io.katacontainers.config.hypervisor.default_vcpus", "2"),
            ("io.kubernetes.cri.sandbox-namespace", "another's"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        linux: Some(linux).into(),
        ..Default::default()
    }
}

fn kinds(spec: &Spec) -> Vec<(&str, Option<&str>)> {
    let namespaces = &spec.linux.as_ref().unwrap().namespaces;
    namespaces.iter().map(|namespace| (namespace.kind.as_str(), namespace.path.as_deref())).collect()
}

#[test]
fn a_pod_becomes_the_specification_of_a_sandbox_container() {
    let pod = PodConfig::new(&request(&config()), Path::new("/run/k/pod")).unwrap();
    let (spec, linux) = (&pod.spec, pod.spec.linux.as_ref().unwrap());
    assert!(spec.is_sandbox() && spec.owns_pid_namespace());
    assert_eq!(spec.hostname.as_deref(), Some("web-0"));
    assert_eq!(linux.cgroups_path.as_deref(), Some("/kubepods/pod1/pod"));
    assert_eq!(spec.annotations["io.katacontainers.config.hypervisor.default_vcpus"], "2");
    assert_eq!(spec.annotations["io.kubernetes.cri.sandbox-id"], "pod");
    assert_eq!(spec.owner("k8s.io"), "k8s.io/shop");
    assert_eq!(crate::machine::size::Limits::announced(spec).milli_cpus, 1500);
    assert_eq!(linux.rest["sysctl"]["kernel.shm_rmid_forced"], "1");
    assert_eq!(linux.rest["sysctl"]["net.ipv4.ip_unprivileged_port_start"], "0");
    let network = ("network", Some("/run/netns/cni-1"));
    assert_eq!(kinds(spec), [("mount", None), ("uts", None), network, ("pid", None), ("ipc", None)]);
    assert_eq!(pod.contents[0].1, b"web-0\n");
    let expected = "search a.example b.example\nnameserver 10.0.0.10\nnameserver fd00::10\noptions ndots:5\n";
    assert_eq!(String::from_utf8_lossy(&pod.contents[2].1), expected);
}

#[test]
fn the_nodes_namespaces_are_left_out() {
    let node = protobuf::EnumOrUnknown::new(NamespaceMode::NODE);
    let options = NamespaceOption { network: node, pid: node, ipc: node, ..Default::default() };
    let context =
        LinuxSandboxSecurityContext { namespace_options: Some(options).into(), ..Default::default() };
    let linux = LinuxPodSandboxConfig { security_context: Some(context).into(), ..Default::default() };
    let config = PodSandboxConfig { linux: Some(linux).into(), ..Default::default() };
    let pod = PodConfig::new(&request(&config), Path::new("/run/k/pod")).unwrap();
    assert_eq!(kinds(&pod.spec), [("mount", None), ("uts", None)]);
}

#[test]
fn a_user_namespace_is_there_if_it_is_asked_for() {
    let has_one = |mode: Option<NamespaceMode>| {
        let users = mode.map(|mode| UserNamespace { mode: mode.into(), ..Default::default() });
        let options = NamespaceOption { userns_options: users.into(), ..Default::default() };
        let context =
            LinuxSandboxSecurityContext { namespace_options: Some(options).into(), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context).into(), ..Default::default() };
        let config = PodSandboxConfig { linux: Some(linux).into(), ..Default::default() };
        let pod = PodConfig::new(&request(&config), Path::new("/run/k/pod")).unwrap();
        kinds(&pod.spec).contains(&("user", None))
    };
    assert!(has_one(Some(NamespaceMode::POD)));
    assert!(!has_one(Some(NamespaceMode::NODE)) && !has_one(None));
}

#[test]
fn a_client_that_is_not_kubernetes_gets_a_pod_as_well() {
    let bare = CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    let pod = PodConfig::new(&bare, Path::new("/run/k/pod")).unwrap();
    assert!(kinds(&pod.spec).contains(&("network", None)));
    assert!(pod.spec.hostname.is_some());
    assert_eq!(pod.spec.linux.as_ref().unwrap().cgroups_path, None);
}

#[test]
fn wrong_requests_are_refused() {
    let refused = |request: &CreateSandboxRequest| {
        PodConfig::new(request, Path::new("/run/k/pod")).unwrap_err().to_string()
    };
    let mut wrong = request(&config());
    wrong.options.mut_or_insert_default().value = b"\x12\xff".to_vec();
    assert!(refused(&wrong).starts_with("runtime.v1.PodSandboxConfig: "), "{}", refused(&wrong));
    wrong.options.mut_or_insert_default().type_url = "runtimeoptions.v1.Options".into();
    assert_eq!(refused(&wrong), "options are runtimeoptions.v1.Options, not a runtime.v1.PodSandboxConfig");
}

#[test]
fn what_containerd_says_of_a_pod_is_not_the_pods_to_say() {
    let mut config = config();
    config.linux.mut_or_insert_default().resources = None.into();
    for (name, value) in [
        ("io.kubernetes.cri.sandbox-memory", "1099511627776"),
        ("io.kubernetes.cri.container-type", "container"),
        ("io.kubernetes.cri-o.ContainerType", "container"),
        ("example.com/mine", "1"),
    ] {
        config.annotations.insert(name.into(), value.into());
    }
    let mut request = request(&config);
    request.annotations.insert("io.kubernetes.cri.sandbox-cpu-period".into(), "7".into());
    let spec = PodConfig::new(&request, Path::new("/run/k/pod")).unwrap().spec;
    assert_eq!(crate::machine::size::Limits::announced(&spec), crate::machine::size::Limits::default());
    assert!(spec.is_sandbox() && !spec.annotations.contains_key("io.kubernetes.cri-o.ContainerType"));
    assert_eq!(spec.annotations["example.com/mine"], "1");
    assert_eq!(spec.annotations["io.kubernetes.cri.sandbox-cpu-period"], "7");
}

#[test]
fn cgroups_are_named_as_their_parents_are() {
    let cases = [
        ("", None),
        ("/kubepods/pod1/", Some("/kubepods/pod1/id")),
        ("/kubepods.slice/kubepods-pod1.slice", Some("kubepods-pod1.slice:cri-containerd:id")),
    ];
    for (parent, expected) in cases {
        assert_eq!(cgroups_path(parent, "id").as_deref(), expected, "{parent}");
    }
}

#[test]
fn containers_get_what_they_have_not_got() {
    let files = PodFiles { directory: "/run/k/pod/files".into() };
    let mut spec: Spec = serde_json::from_value(json!({
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "options": ["size=65536k"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/hosts", "options": ["rbind"]},
        ],
    }))
    .unwrap();
    files.add_to(&mut spec);
    let source = |destination: &str| {
        let mut mounts = spec.mounts.iter().filter(|mount| mount.destination == Path::new(destination));
        let found = mounts.next().unwrap();
        assert!(mounts.next().is_none(), "{destination}");
        (found.source.clone().unwrap_or_default().display().to_string(), found.options.last().cloned())
    };
    let of_pod = |name: &str, access: &str| (format!("/run/k/pod/files/{name}"), Some(access.to_owned()));
    assert_eq!(source("/dev/shm"), of_pod("shm", "rw"));
    assert_eq!(source("/etc/hostname"), of_pod("hostname", "ro"));
    assert_eq!(source("/etc/resolv.conf"), of_pod("resolv.conf", "ro"));
    assert_eq!(source("/etc/hosts").0, "/var/lib/kubelet/hosts");
    let pod = crate::spec::Pod { shared_memory: Some(files.shared_memory().0), ..Default::default() };
    assert_eq!(spec.sources(Path::new("/b"), &pod)[1], crate::spec::Source::SharedMemory);
}

#[test]
fn fuzz_pod_config() {
    katana_fuzz::fuzz("pod-config", |input| {
        let mut request = request(&PodSandboxConfig::default());
        request.options.mut_or_insert_default().value = input.rest().to_vec();
        if let Ok(pod) = PodConfig::new(&request, Path::new("/run/k/pod")) {
            assert!(pod.spec.process.is_some());
        }
    });
}
