//! Katana beside the host and beside runc.

use katana_tests::process::Process;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Command, NGINX, Run, environment};

#[test]
fn the_kernel_is_the_guests_own() {
    let _turn = shared();
    let host = Command::new(&["uname", "-r"]).output().ok().text();
    let inside = Run::new(BUSYBOX).command(&["uname", "-r"]).output().ok().text();
    assert_eq!(inside != host, environment::is_vm(), "inside {inside:?}, outside {host:?}");
}

#[test]
fn nginx_answers_inside_and_is_not_seen_on_the_host() {
    let _turn = shared();
    let container = Run::new(NGINX).start();
    let script = "until busybox wget -q -O - http://127.0.0.1/; do sleep 0.2; done 2>/dev/null";
    container.sh(script).ok().expect_text("katana nginx ok");
    let names = container.sh("cat /proc/[0-9]*/comm").ok();
    assert!(names.text().lines().filter(|name| *name == "nginx").count() >= 2, "master and worker\n{names}");
    let seen = Process::all().iter().any(|process| process.name == "nginx");
    assert_eq!(seen, !environment::is_vm(), "whether the host has a process nginx");
}

#[test]
fn runc_works_beside() {
    let _turn = shared();
    let host = Command::new(&["uname", "-r"]).output().ok().text();
    let ours = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    let other = Run::new(BUSYBOX).runtime(environment::RUNC).command(&["sleep", "10000"]).start();
    assert_eq!(other.exec(&["uname", "-r"]).ok().text(), host);
    assert_eq!(ours.exec(&["uname", "-r"]).ok().text() != host, environment::is_vm());
    drop(other);
    ours.exec(&["true"]).ok();
}

/// Two containers are two machines: nothing of one is seen in the other.
#[test]
fn two_containers_do_not_see_each_other() {
    let _turn = shared();
    let one = Run::new(BUSYBOX).sh("echo one > /dev/shm/mark; sleep 10000").start();
    let other = Run::new(BUSYBOX).command(&["sleep", "10001"]).start();
    other.sh("ls /dev/shm | wc -l; ps | grep -c '[s]leep 10000'").expect_text("0\n0");
    one.sh("until cat /dev/shm/mark; do sleep 0.1; done 2>/dev/null").ok().expect_text("one");
}
