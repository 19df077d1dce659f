//! Standard streams.

use katana_tests::scratch::noise;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Run, Scratch, environment};

const MIB: usize = 1 << 20;

/// Byte for byte is more than a checksum: it shows where the first difference is.
#[track_caller]
fn expect_same(found: &[u8], expected: &[u8], context: &str) {
    let difference = found.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        difference.is_none() && found.len() == expected.len(),
        "{} bytes arrived of {}; the first difference is at {difference:?}\n{context}",
        found.len(),
        expected.len()
    );
}

/// Every byte written before the exit arrives before the exit (kata-containers#9186, #1713).
#[test]
fn a_large_output_arrives_whole_and_then_the_exit() {
    let _turn = shared();
    let scratch = Scratch::new();
    let expected = noise(64 * MIB, 1);
    let (long, short) = (scratch.file("long", &expected), scratch.file("short", &expected[..8 * MIB]));
    // Once more than all buffers on the way hold; the other rounds are for the exit, which is close behind.
    for round in 0..environment::rounds(5) {
        let (file, length) = if round % 5 == 0 { (&long, 64 * MIB) } else { (&short, 8 * MIB) };
        let run = Run::new(BUSYBOX).bind(file, "/noise", "ro").sh("cat /noise; exit 3");
        let output = run.output().expect_code(3);
        let context = format!("round {round}, stderr: {}", output.errors());
        expect_same(&output.stdout, &expected[..length], &context);
    }
}

#[test]
fn standard_input_passes_to_its_end() {
    let _turn = shared();
    let expected = noise(32 * MIB, 2);
    let output = Run::new(BUSYBOX).command(&["cat"]).input(expected.clone()).output().ok();
    expect_same(&output.stdout, &expected, &output.errors());
}

#[test]
fn output_and_errors_are_two_streams() {
    let _turn = shared();
    let output = Run::new(BUSYBOX).sh("echo out; echo err >&2; exit 5").output().expect_code(5);
    assert_eq!((output.text().as_str(), output.stderr.starts_with(b"err\n")), ("out\n", true), "{output}");
}

/// A process that lives on in the background keeps neither output nor exit back.
#[test]
fn the_exit_does_not_wait_for_background_processes() {
    let _turn = shared();
    Run::new(BUSYBOX).sh("sleep 10000 & echo done; exit 6").output().expect_code(6).expect_text("done");
}

#[test]
fn a_terminal_and_its_changes_of_size() {
    let _turn = shared();
    let script = "trap 'echo changed to $(stty size)' WINCH; trap 'exit 7' INT
        until [ \"$(stty size)\" = '33 91' ]; do sleep 0.2; done
        test -t 0 && test -t 1 && test -t 2 && echo on a terminal of $(stty size)
        while :; do sleep 0.2; done";
    let terminal = Run::new(BUSYBOX).sh(script).spawn_on_terminal(33, 91);
    terminal.running().wait_for("on a terminal of 33 91");
    terminal.resize(50, 132);
    terminal.running().wait_for("changed to 50 132");
    terminal.resize(20, 40);
    terminal.running().wait_for("changed to 20 40");
    // The interrupt character: the terminal in the container turns it into the signal.
    terminal.type_keys("\x03");
    terminal.finish().expect_code(7);
}

#[test]
fn a_shell_on_a_terminal_talks() {
    let _turn = shared();
    let terminal = Run::new(BUSYBOX).command(&["sh"]).spawn_on_terminal(24, 80);
    terminal.type_keys("echo $((6 * 7)) is the answer\n");
    terminal.running().wait_for("42 is the answer");
    terminal.type_keys("tty; exit 9\n");
    let output = terminal.finish().expect_code(9);
    assert!(output.text().contains("/dev/pts/0") || output.text().contains("/dev/console"), "{output}");
}
