use super::*;
use containerd_shim_protos::bootstrap_api::Extension;

fn args() -> Args {
    Args { id: "c1".into(), namespace: "ns".into(), address: "/run/a.sock".into(), ..Args::default() }
}

fn parse(input: &[u8], environment: &[(&str, &str)]) -> Result<Request> {
    let get =
        |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    Request::parse(&args(), input, &get)
}

#[test]
fn each_containerd_is_understood() {
    let old = parse(&[], &[("TTRPC_ADDRESS", "/t"), ("MAX_SHIM_VERSION", "2")]).unwrap();
    let expected = Request {
        protocol: Protocol::Address,
        address: "/run/a.sock".into(),
        ttrpc_address: "/t".into(),
        socket_dir: None,
        config: None,
        debug: false,
    };
    assert_eq!(old, expected);
    let options = Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value: b"\x12\x01x".to_vec(),
        ..Default::default()
    };
    let packed = options.write_to_bytes().unwrap();
    let configured = Request { config: Some("x".into()), ..parse(&[], &[("TTRPC_ADDRESS", "/t")]).unwrap() };
    assert_eq!(parse(&packed, &[("TTRPC_ADDRESS", "/t")]).unwrap(), configured);
    assert_eq!(parse(b"\xff\xff", &[("TTRPC_ADDRESS", "/t")]).unwrap(), expected);
    let json = parse(&[], &[("TTRPC_ADDRESS", "/t"), ("MAX_SHIM_VERSION", "3")]).unwrap();
    assert_eq!(json.protocol, Protocol::Json);
    let params = BootstrapParams {
        instance_id: "c1".into(),
        namespace: "ns".into(),
        containerd_ttrpc_address: "/t2".into(),
        containerd_grpc_address: "/g".into(),
        socket_dir: Some("/run/s".into()),
        extensions: vec![Extension { value: Some(options).into(), ..Default::default() }],
        log_level: containerd_shim_protos::bootstrap_api::LogLevel::LOG_LEVEL_DEBUG.into(),
        ..Default::default()
    };
    let new = parse(&params.write_to_bytes().unwrap(), &[]).unwrap();
    assert_eq!(
        new,
        Request {
            protocol: Protocol::Protobuf,
            address: "/g".into(),
            ttrpc_address: "/t2".into(),
            socket_dir: Some("/run/s".into()),
            config: Some("x".into()),
            debug: true
        }
    );
    let other = BootstrapParams { instance_id: "c2".into(), ..params };
    let error = parse(&other.write_to_bytes().unwrap(), &[]).unwrap_err().to_string();
    assert_eq!(error, "bootstrap parameters are for ns/c2");
    assert_eq!(parse(&[], &[]).unwrap_err().to_string(), "TTRPC_ADDRESS is not set in the environment");
}

#[test]
fn containers_are_grouped_by_their_sandbox() {
    let bundle = std::env::temp_dir().join(format!("katana-group-{}", std::process::id()));
    fs::create_dir(&bundle).unwrap();
    let sandbox = |config: &str| {
        fs::write(bundle.join("config.json"), config).unwrap();
        sandbox_of(&bundle, "own")
    };
    let cri = |kind: &str, id: &str| {
        format!(
            "{{\"annotations\": {{\"io.kubernetes.cri.container-type\": \"{kind}\", \"io.kubernetes.cri.sandbox-id\": \"{id}\"}}}}"
        )
    };
    assert_eq!(sandbox(&cri("container", "pod")), "pod");
    assert_eq!(sandbox(&cri("sandbox", "own")), "own");
    assert_eq!(sandbox(&cri("container", "")), "own");
    let crio = "{\"annotations\": {\"io.kubernetes.cri-o.ContainerType\": \"container\", \"io.kubernetes.cri-o.SandboxID\": \"pod\"}}";
    assert_eq!(sandbox(crio), "pod");
    for odd in ["", "{}", "[]", "{\"annotations\": null}", "{\"annotations\": {\"a\": 1}}"] {
        assert_eq!(sandbox(odd), "own", "{odd}");
    }
    // What an annotation says becomes part of paths only after a check.
    assert!(Identity::new("/a", "ns", &sandbox(&cri("container", "../../x"))).is_err());
    fs::remove_dir_all(bundle).unwrap();
}

#[test]
fn the_socket_is_for_root_alone() {
    let path = std::env::temp_dir().join(format!("katana-socket-{}", std::process::id()));
    let listener = listen(&path).unwrap();
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&path).unwrap());
    assert_eq!(mode & 0o7777, 0o600);
    let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
    fs::remove_file(path).unwrap();
}
