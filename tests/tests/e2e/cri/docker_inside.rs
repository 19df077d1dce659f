//! Docker in a container of a pod, on an emptyDir.

use katana_tests::cri::{Container, Pod};
use katana_tests::{Scratch, environment, host::eventually, turn};
use serde_json::json;

/// What images of Docker do at their start: the daemon's containers get cgroups beside the daemon's own, since a cgroup
/// with processes in it has no controllers for others (cgroup-v2.rst, "No Internal Process Constraint"). Docker waits for
/// a containerd that it starts itself for 15 s, which is not enough on a slow machine.
const START: &str = "
    cd /sys/fs/cgroup && mkdir -p init
    for process in $(cat cgroup.procs); do echo $process > init/cgroup.procs 2>/dev/null; done
    sed 's/^/+/; s/ / +/g' cgroup.controllers > cgroup.subtree_control
    export PATH=/usr/sbin:/usr/bin:/bin
    containerd > /root/containerd.log 2>&1 &
    until [ -S /run/containerd/containerd.sock ]; do sleep 0.1; done
    dockerd --containerd /run/containerd/containerd.sock > /root/log 2>&1 &
";

const BUILD: &str = r#"
    export PATH=/usr/sbin:/usr/bin:/bin
    set -e
    docker info -f '{{.Driver}}'
    mkdir -p /root/context; cp /bin/busybox /root/context
    tar -c -C /root/context busybox | docker import - base > /dev/null
    docker save base > /root/base.tar; docker rmi base > /dev/null; docker load < /root/base.tar
    cat > /root/context/Dockerfile <<-END
	FROM base
	RUN ["/busybox", "sh", "-c", "/busybox mkdir /bin && /busybox --install /bin && echo built > /etc-built"]
	RUN ["/bin/sh", "-c", "rm /bin/wget && echo second >> /etc-built"]
	CMD ["/bin/sh", "-c", "cat /etc-built; ls /bin/wget; ip addr show eth0 | grep -o 172.17.0"]
	END
    docker build -q -t built /root/context > /dev/null
"#;

fn started(pod: &Pod, scratch: &Scratch) -> Container {
    let uid = &pod.config().metadata.uid;
    let images = scratch.directory(&format!("pods/{uid}/volumes/kubernetes.io~empty-dir/images"));
    let read_only = |host: &str, at: &str| json!({"host_path": host, "container_path": at, "readonly": true});
    pod.start(json!({
        "linux": {"security_context": {"privileged": true}},
        "mounts": [
            read_only("/usr", "/usr"), read_only("/usr/lib", "/lib"), read_only("/usr/lib64", "/lib64"),
            read_only("/etc/alternatives", "/etc/alternatives"),
            {"host_path": images, "container_path": "/var/lib/docker"},
        ],
    }))
}

#[test]
fn images_are_loaded_built_and_run_with_overlayfs() {
    // It has much to do, and Docker has limits of time of its own.
    let _turn = turn::alone();
    if !environment::is_vm_or_say("the daemon is that of the test machine") {
        return;
    }
    let scratch = Scratch::new();
    let security = json!({"linux": {"security_context": {"privileged": true}}});
    let pod = Pod::run_with("kata", security);
    let container = started(&pod, &scratch);
    container.sh(START).ok();
    let there = || container.sh("PATH=/usr/bin:/bin docker info > /dev/null 2>&1").code == 0;
    assert!(eventually(there), "{:?}", container.sh("tail -n 20 /root/log"));
    let built = container.sh(BUILD);
    assert!(built.ok().starts_with("overlay2"), "{built:?}");
    let run = container.sh("PATH=/usr/bin:/bin docker run --rm --memory 32m built 2>&1");
    let lines: Vec<_> = run.stdout.lines().collect();
    assert_eq!(lines, ["built", "second", "ls: /bin/wget: No such file or directory", "172.17.0"], "{run:?}");
    pod.remove().unwrap();
}
