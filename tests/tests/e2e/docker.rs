//! Docker with `--runtime kata`. Its daemon is Debian's, 26 in trixie.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use katana_tests::container::new_id;
use katana_tests::docker::Docker;
use katana_tests::host::{Host, eventually};
use katana_tests::turn::{alone, shared};
use katana_tests::{BUSYBOX, Scratch, Terminal};

/// `docker run` with these options, detached. The container is known by its name.
#[track_caller]
fn start(docker: &Arc<Docker>, name: &str, options: &str, script: &str) {
    let options = format!("run --detach --runtime kata --name {name} {options} {BUSYBOX} sh -c");
    docker.run(&options, &[script]);
}

#[track_caller]
fn exec(docker: &Docker, name: &str, script: &str) -> String {
    docker.run(&format!("exec {name} sh -c"), &[script]).text().trim().to_owned()
}

fn get(address: (&str, u16)) -> String {
    let mut answer = String::new();
    let connection = TcpStream::connect(address);
    let asked = connection.and_then(|mut connection| {
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        connection.read_to_string(&mut answer)
    });
    asked.map_or_else(|e| e.to_string(), |_| answer)
}

/// Ports, exec, statistics, copies, updates, an image of it, its end and its second start; nothing is left in the end.
#[test]
fn a_container_and_all_that_is_done_to_it() {
    const PORT: u16 = 17301;
    let _turn = alone();
    let Some(docker) = Docker::get() else { return };
    let before = Host::before();
    let (name, scratch) = (new_id(), Scratch::new());
    let script = "trap 'echo bye; exit 6' TERM; echo started; mkdir -p /www; echo a page >/www/index.html
        httpd -f -p 8080 -h /www & wait";
    let options =
        format!("--hostname a-name --env COLOUR=blue --memory 128m --publish 127.0.0.1:{PORT}:8080");
    let container = docker.container(&name);
    start(&docker, &name, &options, script);
    assert_eq!(exec(&docker, &name, "echo $(hostname) $COLOUR"), "a-name blue");

    assert!(eventually(|| get(("127.0.0.1", PORT)).ends_with("a page\n")), "{}", get(("127.0.0.1", PORT)));
    let own = docker.inspect(&name, ".NetworkSettings.IPAddress");
    assert!(get((&own, 8080)).ends_with("a page\n"), "{own}");

    let words = ["sh", "-c", "cat; echo error >&2; exit 7"];
    let output = docker.command(&format!("exec --interactive {name}"), &words).input("input").output();
    assert_eq!((output.text().as_str(), output.errors().as_str()), ("input", "error\n"));
    output.expect_code(7);
    let words = ["sh", "-c", "until [ \"$(stty size)\" = '33 91' ]; do sleep 0.1; done; exit 4"];
    let command = docker.command(&format!("exec --interactive --tty {name}"), &words);
    Terminal::spawn(&command, 33, 91).finish().expect_code(4);

    let statistics = docker.run("stats --no-stream --format", &["{{json .}}", &name]).text();
    let statistics: serde_json::Value = serde_json::from_str(&statistics).expect(&statistics);
    let number = |member: &str| {
        let text = statistics[member].as_str().unwrap_or_default();
        let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
        text[..end].parse::<f32>().unwrap_or_default()
    };
    assert!(["MemUsage", "PIDs", "NetIO"].iter().all(|member| number(member) > 0.0), "{statistics:#}");
    assert!(statistics["MemUsage"].as_str().is_some_and(|text| text.ends_with("/ 128MiB")), "{statistics:#}");

    let there = scratch.file("there", "to the container\n").display().to_string();
    docker.run("cp", &[&there, &format!("{name}:/www/there")]);
    assert_eq!(
        exec(&docker, &name, "cat /www/there; echo from the container >/www/back"),
        "to the container"
    );
    docker.run("cp", &[&format!("{name}:/www"), &scratch.path().display().to_string()]);
    let copied =
        |file: &str| std::fs::read_to_string(scratch.path().join("www").join(file)).unwrap_or_default();
    assert_eq!(
        (copied("there"), copied("back")),
        ("to the container\n".into(), "from the container\n".into())
    );

    let on_host = || {
        let pid = docker.inspect(&name, ".State.Pid");
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let path = format!("/sys/fs/cgroup{}/memory.max", cgroup.trim().trim_start_matches("0::"));
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    let before_update = on_host();
    docker.run(&format!("update --memory 96m --memory-swap 96m --cpus 0.5 {name}"), &[]);
    let limits = exec(&docker, &name, "cd /sys/fs/cgroup; cat memory.max cpu.max");
    assert_eq!(limits, format!("{}\n50000 100000", 96 << 20));
    assert!(
        before_update.is_some() && eventually(|| on_host() < before_update),
        "{before_update:?}, {:?}",
        on_host()
    );

    let image = format!("localhost/{name}:1");
    docker.run("commit --change", &["CMD [\"cat\", \"/www/back\"]", &name, &image]);
    docker.run(&format!("run --rm --runtime kata {image}"), &[]).expect_text("from the container");
    docker.run("rmi", &[&image]);

    docker.run(&format!("stop --time 60 {name}"), &[]);
    assert_eq!(docker.inspect(&name, ".State.Status"), "exited");
    assert_eq!(docker.inspect(&name, ".State.ExitCode"), "6");
    docker.run("start", &[&name]);
    assert_eq!(exec(&docker, &name, "cat /www/back"), "from the container");
    drop(container);
    assert!(!docker.run("ps --all", &[]).text().contains(&name));
    before.expect_unchanged();
}

#[test]
fn a_shell_on_a_terminal_by_the_name_of_the_runtime() {
    let _turn = shared();
    let Some(docker) = Docker::get() else { return };
    let options = format!("run --interactive --tty --rm --runtime io.containerd.kata.v2 {BUSYBOX} sh");
    let terminal = Terminal::spawn(&docker.command(&options, &[]), 31, 87);
    terminal.running().wait_for("# ");
    terminal.type_keys("until [ \"$(stty size)\" = '31 87' ]; do sleep 0.1; done; echo it is | tr a-z A-Z\n");
    terminal.running().wait_for("IT IS");
    terminal.type_keys("exit 5\n");
    terminal.finish().expect_code(5);
}

/// As in a file for Compose: a network, a server that others know by its names.
#[test]
fn containers_of_a_network_know_each_other_by_name() {
    let _turn = shared();
    let Some(docker) = Docker::get() else { return };
    let (network, server) = (new_id(), new_id());
    let _network = docker.network(&network);
    let _server = docker.container(&server);
    let script = "mkdir /www; echo a page >/www/index.html; exec httpd -f -p 8080 -h /www";
    start(&docker, &server, &format!("--network {network} --network-alias web"), script);
    let script = format!(
        "for host in {server} web; do wget -q -O - http://$host:8080/ || exit 1; done
         nslookup no-such-host >/dev/null || echo unknown"
    );
    let client =
        docker.run(&format!("run --rm --runtime kata --network {network} {BUSYBOX} sh -c"), &[&script]);
    client.expect_text("a page\na page\nunknown");
}

#[test]
fn containers_are_restarted_as_their_policies_say() {
    let _turn = shared();
    let Some(docker) = Docker::get() else { return };
    let [failing, always] = [new_id(), new_id()];
    let _containers = [docker.container(&failing), docker.container(&always)];
    start(&docker, &always, "--restart always", "echo started; exec sleep 10000");
    let first = docker.inspect(&always, ".State.Pid");
    start(&docker, &failing, "--restart on-failure:2", "echo started; exit 3");
    // The whole virtual machine is gone.
    let pid = first.parse().expect(&first);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).expect("kill");
    let state =
        |name: &str| docker.inspect(name, ".State.Status") + " " + &docker.inspect(name, ".RestartCount");
    assert!(eventually(|| state(&always) == "running 1"), "{}", state(&always));
    assert!(eventually(|| state(&failing) == "exited 2"), "{}", state(&failing));
    assert_ne!(docker.inspect(&always, ".State.Pid"), first);
    assert_eq!(docker.inspect(&failing, ".State.ExitCode"), "3");
    for (name, times) in [(&always, 2), (&failing, 3)] {
        let logged = || docker.run("logs", &[name]).text() == "started\n".repeat(times);
        assert!(eventually(logged), "{}", docker.run("logs", &[name]));
    }
}
