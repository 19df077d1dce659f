//! What goes wrong is named in one line, soon, and leaves nothing.

use std::fs;

use serde_json::json;
use ttrpc::Code;

use crate::containerd::{Containerd, can_run, code_and_text, ctx, shim};

/// Create fails with this text, and afterwards no trace but the shim's socket is left.
async fn fails(containerd: &Containerd, expected: &str) {
    let (code, text) =
        code_and_text(containerd.client.create(ctx(), &containerd.create_request()).await.unwrap_err());
    assert!(text.contains(expected) && !text.contains('\n'), "{code:?} {text}");
    assert_eq!(containerd.traces(), [containerd.address.strip_prefix("unix://").unwrap()]);
    assert_eq!(code_and_text(containerd.state("").await.unwrap_err()).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_machine_that_does_not_come_up() {
    if !can_run() {
        return;
    }
    let cases = [
        ("fail=boot", "kernel: not an ELF file"),
        (
            "fail=panic",
            "the guest's kernel panicked: Kernel panic - not syncing: Attempted to kill init!; last console lines: \
             Linux 6 | Kernel panic",
        ),
        ("fail=silent", "the agent in the guest did not connect within 3 s"),
    ];
    for (number, (parameter, expected)) in cases.into_iter().enumerate() {
        let containerd = Containerd::start_with(&format!("boot{number}"), parameter).await;
        fails(&containerd, expected).await;
        containerd.shut_down().await;
        assert!(containerd.topics().is_empty());
    }
}

#[tokio::test]
async fn files_and_settings_that_are_wrong() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("wrong").await;
    let (kernel, image) = (containerd.directory.join("kernel"), containerd.directory.join("image"));
    let configuration = containerd.directory.join("configuration.toml");
    let intact = fs::read_to_string(&configuration).unwrap();

    fs::rename(&kernel, kernel.with_extension("away")).unwrap();
    fails(&containerd, &format!("kernel \"{}\": No such file or directory", kernel.display())).await;
    fs::rename(kernel.with_extension("away"), &kernel).unwrap();
    fs::write(&image, "not an image").unwrap();
    fails(&containerd, &format!("guest image \"{}\" is not an erofs image", image.display())).await;
    fs::write(&configuration, intact.replace("dial_timeout", "nonsense")).unwrap();
    fails(&containerd, "nonsense").await;
    fs::write(&configuration, &intact).unwrap();
    fs::remove_file(containerd.directory.join("kata-vmm")).unwrap();
    let mut erofs = vec![0; 4096];
    erofs[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
    fs::write(&image, erofs).unwrap();
    fails(&containerd, "kata-vmm\": No such file or directory").await;
    containerd.shut_down().await;
}

#[tokio::test]
async fn containers_that_cannot_be_made() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("refused").await;
    containerd.configure_container(&json!({"mounts": [
        {"destination": "/mnt", "type": "bind", "source": "/nowhere", "options": ["rbind"]}]}));
    fails(
        &containerd,
        "error mounting \"/nowhere\" to rootfs at \"/mnt\": stat /nowhere: no such file or directory",
    )
    .await;
    containerd.configure_container(&json!({"mounts": [], "process": {"args": ["nowhere"]}}));
    let created = containerd.client.create(ctx(), &containerd.create_request()).await;
    let text = match created {
        Err(e) => code_and_text(e).1,
        Ok(_) => {
            let start =
                containerd_shim_protos::api::StartRequest { id: containerd.id(), ..Default::default() };
            let text = code_and_text(containerd.client.start(ctx(), &start).await.unwrap_err()).1;
            containerd.wait("").await;
            containerd.delete("").await.unwrap();
            text
        }
    };
    assert!(text.contains("executable file not found in $PATH"), "{text}");
    let mut request = containerd.create_request();
    request.stdout = "/nowhere/fifo".into();
    let (_, text) = code_and_text(containerd.client.create(ctx(), &request).await.unwrap_err());
    assert_eq!(text, "open /nowhere/fifo: No such file or directory");
    request.id = "../../etc".into();
    let error = code_and_text(containerd.client.create(ctx(), &request).await.unwrap_err());
    assert_eq!(error.0, Code::INVALID_ARGUMENT);
    containerd.shut_down().await;
}

/// What hooks of its creation have set up, those of its end take away.
#[tokio::test]
async fn a_container_that_cannot_be_made_has_an_end() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("unmade").await;
    let (there, ran) = (containerd.directory.join("there"), containerd.directory.join("ran"));
    let shell = |script: String| json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    let create = shell(format!(": > {}; : > {}", there.display(), ran.display()));
    let stopped = format!("case $s in *'\"status\":\"stopped\"'*) exec /bin/rm {};; esac", there.display());
    let hooks = |create| json!({"createRuntime": create, "poststop": [shell(format!("read s; {stopped}"))]});
    let cases = [
        // In the guest.
        (
            json!([create]),
            json!([{"destination": "/mnt", "type": "nonsense", "source": "x"}]),
            "error mounting \"x\"",
        ),
        (json!([create, shell("exit 9".into())]), json!([]), "exit status: 9"),
    ];
    for (create, mounts, expected) in cases {
        containerd.configure_container(&json!({"hooks": hooks(create), "mounts": mounts}));
        fails(&containerd, expected).await;
        fs::remove_file(&ran).unwrap();
        assert!(!there.exists());
    }
    containerd.shut_down().await;
}

/// Its record would be overwritten, and with it the knowledge of what is left.
#[tokio::test]
async fn a_pod_does_not_take_the_place_of_one_that_cannot_be_removed() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("left").await;
    containerd.client.create(ctx(), &containerd.create_request()).await.unwrap();
    let state = containerd.traces().remove(0);
    containerd.delete("").await.unwrap();
    // It is there and cannot be read.
    let record = std::path::Path::new(&state).join("state.json");
    fs::create_dir_all(&record).unwrap();
    let (_, text) =
        code_and_text(containerd.client.create(ctx(), &containerd.create_request()).await.unwrap_err());
    assert!(text.starts_with(&state) && text.contains("could be removed"), "{text}");
    assert!(record.exists());
    fs::remove_dir(record).unwrap();
    containerd.client.create(ctx(), &containerd.create_request()).await.unwrap();
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
}

#[tokio::test]
async fn a_start_that_fails_says_why_in_one_line() {
    if !can_run() {
        return;
    }
    let directory = std::env::temp_dir().join(format!("katana-start-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let bad = "{\"annotations\": {\"io.kubernetes.cri.container-type\": \"container\", \"io.kubernetes.cri.sandbox-id\": \"../x\"}}";
    fs::write(directory.join("config.json"), bad).unwrap();
    for (id, expected) in [("ok", "id \"../x\" must match"), ("-x/..", "must match")] {
        let output = shim(&directory, &directory, id, "start");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty());
        assert!(text.contains(expected) && text.lines().count() == 1, "{text}");
    }
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn version_and_info() {
    use containerd_shim_protos::types::introspection::RuntimeInfo;
    use protobuf::Message;
    let run = |argument: &str| {
        let program = env!("CARGO_BIN_EXE_containerd-shim-kata-v2");
        let output =
            std::process::Command::new(program).arg(argument).stdin(std::process::Stdio::null()).output();
        output.unwrap()
    };
    let version = String::from_utf8(run("-v").stdout).unwrap();
    assert!(version.starts_with("containerd-shim-kata-v2:\n  Version:  "), "{version}");
    assert_eq!(String::from_utf8(run("--version").stdout).unwrap(), version);
    let info = RuntimeInfo::parse_from_bytes(&run("-info").stdout).unwrap();
    assert_eq!(info.name, "io.containerd.kata.v2");
    let unknown = run("-nonsense");
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8(unknown.stderr).unwrap().contains("flag provided but not defined: -nonsense"));
}
