//! Names: files of the client, and name servers of the host.

use super::*;

#[test]
fn names_are_those_of_the_files_that_the_client_gives() {
    let _turn = shared();
    let scratch = Scratch::new();
    let files = ["hosts", "resolv.conf", "hostname"];
    let contents = ["10.1.2.3 somebody\n", "nameserver 10.1.2.9\nsearch example.org\n", "named\n"];
    let run = files.iter().zip(contents).fold(Run::new(DEBIAN), |run, (name, content)| {
        let path = scratch.file(name, content);
        run.bind(&path, &format!("/etc/{name}"), "ro")
    });
    let script = "getent hosts somebody; cat /etc/resolv.conf /etc/hostname";
    let output = run.options("--hostname named").sh(&format!("{script}; hostname")).output().ok();
    let text = output.text();
    assert!(
        text.starts_with("10.1.2.3")
            && text.contains("nameserver 10.1.2.9\nsearch example.org\nnamed\nnamed\n"),
        "{output}"
    );
}

/// Answers to any question of type A (1) with 10.1.2.3 and to others with nothing: RFC 1035, 4.1.
fn dns_answer(question: &[u8]) -> Vec<u8> {
    let end = 12 + question[12..].iter().position(|length| *length == 0).expect("a name's end") + 5;
    let known = question[end - 4..end - 2] == [0, 1];
    let header = [&question[..2], &[0x81, 0x80, 0, 1, 0, u8::from(known), 0, 0, 0, 0]].concat();
    let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3];
    [&header[..], &question[12..end], if known { &record[..] } else { &[] }].concat()
}

/// A name server on the namespace's loopback interface, as Docker has for its user networks.
fn serve_names(namespace: &Namespace) {
    let path = format!("/run/netns/{}", namespace.name());
    let (sender, ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let namespace = std::fs::File::open(path).expect("the namespace");
        // SAFETY: setns takes two integers.
        let entered = unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&namespace), libc::CLONE_NEWNET) };
        assert_eq!(entered, 0, "{}", std::io::Error::last_os_error());
        let udp = UdpSocket::bind("127.0.0.11:53").expect("bind");
        let tcp = TcpListener::bind("127.0.0.11:53").expect("bind");
        sender.send(()).expect("the test");
        std::thread::spawn(move || {
            for mut connection in tcp.incoming().flatten() {
                let mut length = [0; 2];
                while connection.read_exact(&mut length).is_ok() {
                    let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                    connection.read_exact(&mut question).expect("a question");
                    let answer = dns_answer(&question);
                    let length = u16::try_from(answer.len()).expect("a short answer").to_be_bytes();
                    connection.write_all(&[&length[..], &answer].concat()).expect("answer");
                }
            }
        });
        let mut packet = vec![0; 65536];
        while let Ok((length, client)) = udp.recv_from(&mut packet) {
            let _ = udp.send_to(&dns_answer(&packet[..length]), client);
        }
    });
    ready.recv().expect("the server");
}

/// kata-containers#6688
#[test]
fn a_name_server_on_the_loopback_interface_of_the_namespace() {
    let _turn = shared();
    let (bridge, namespace) = (Bridge::new(1500), Namespace::new());
    bridge.connect(namespace.name(), "eth0", 2);
    serve_names(&namespace);
    let scratch = Scratch::new();
    let file = scratch.file("resolv.conf", "nameserver 127.0.0.11\noptions ndots:0\n");
    let run = Run::new(DEBIAN).options(&namespace.option()).bind(&file, "/etc/resolv.conf", "ro");
    let script = "for number in 1 2 3 4 5; do getent ahostsv4 name$number & done; wait
        RES_OPTIONS=use-vc getent ahostsv4 by-tcp";
    let output = run.sh(script).output().ok();
    let answers =
        output.text().lines().filter(|line| line.starts_with("10.1.2.3 ") && line.contains("STREAM")).count();
    assert_eq!(answers, 6, "{output}");
}
