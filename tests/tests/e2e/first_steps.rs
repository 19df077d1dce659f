//! Documents that show commands with their output: each is run, and shows that.

use std::path::Path;

use katana_tests::docker::Docker;
use katana_tests::out_of_sight::OutOfSight;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Command, Containerd, Scratch, ctr, environment, pages};

/// What the documents take for pulled.
const IMAGE: &str = "docker.io/library/busybox:latest";
/// A file of a node of Kata Containers.
const STOCK: &str = include_str!("../../../config/src/tests/stock/qemu.toml");

/// Runs all steps in one directory, with these variables, and names all that show something else.
#[track_caller]
fn follow(page: &str, text: &str, variables: &[String]) {
    let scratch = Scratch::new();
    let directory = scratch.path().display().to_string();
    let path = format!("PATH={}:{}", environment::bin().display(), std::env::var("PATH").unwrap_or_default());
    let address = format!("CONTAINERD_ADDRESS={}", Containerd::current().address().display());
    let steps = pages::steps(text);
    assert!(!steps.is_empty(), "{page} shows nothing");
    let mut wrong = Vec::new();
    for step in steps {
        let script = format!("exec 2>&1\n{}", step.command);
        let mut words = vec!["env", "-C", &directory, &path, &address];
        words.extend(variables.iter().map(String::as_str));
        words.extend(["bash", "-euc", &script]);
        let output = Command::new(&words).output();
        if output.code != 0 || !step.is_shown(&output.text()) {
            wrong.push(format!("{page}:{}: it shows\n{}\n{output}", step.line, step.shown.join("\n")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a document's steps leave when they fail halfway.
struct Left<'d>(&'d Docker);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        for name in ["first", "second", "third"] {
            let _ = ctr(&["tasks", "delete", "--force", name]).output();
            let _ = ctr(&["containers", "delete", name]).output();
        }
        let _ = self.0.command("rm --force --volumes web steps-web-1 steps-client-1", &[]).output();
        let _ = ctr(&["images", "delete", IMAGE]).output();
    }
}

#[test]
fn the_first_steps_show_what_the_page_says() {
    let _turn = alone();
    if !environment::is_vm_or_say("the page is about virtual machines") {
        return;
    }
    let Some(docker) = Docker::get() else { return };
    let _own = OutOfSight::new();
    let _left = Left(&docker);
    ctr(&["images", "tag", "--force", BUSYBOX, IMAGE]).output().ok();
    docker.run("tag", &[BUSYBOX, IMAGE]);
    let variables = [format!("DOCKER_HOST={}", docker.host())];
    follow("docs/first-steps.md", include_str!("../../../docs/first-steps.md"), &variables);
    docker.run("rmi", &[IMAGE]);
}

/// Katana beside Kata Containers, whose file is the only thing of it that matters here.
#[test]
fn a_node_of_kata_containers_switches_over_as_the_page_says() {
    let _turn = alone();
    if !environment::is_vm_or_say("the page is about virtual machines") {
        return;
    }
    let Some(docker) = Docker::get() else { return };
    let _own = OutOfSight::new();
    let _left = Left(&docker);
    ctr(&["images", "tag", "--force", BUSYBOX, IMAGE]).output().ok();
    let prefix = environment::bin().parent().map(Path::to_owned).expect("an installation");
    let stock = "/opt/kata/share/defaults/kata-containers/configuration-qemu.toml";
    std::fs::write(stock, STOCK).expect("a file of Kata Containers");
    // As `make install PREFIX=/opt/katana` does.
    let install = format!(
        "cp -r {} /opt/katana
         sed -i s,/opt/kata/,/opt/katana/,g /opt/katana/share/defaults/kata-containers/configuration.toml",
        prefix.display()
    );
    Command::new(&["sh", "-ec", &install]).output().ok();
    follow("docs/migrating-from-kata.md", include_str!("../../../docs/migrating-from-kata.md"), &[]);
    for path in ["/opt/katana", "/etc/katana"] {
        std::fs::remove_dir_all(path).expect(path);
    }
    std::fs::remove_file(stock).expect(stock);
}
