use super::*;

const ALLOW: u32 = bpf::ALLOW;
const EPERM: u32 = bpf::ERRNO | 1;
const ENOSYS: u32 = bpf::ERRNO | 38;

/// Runs a filter as the kernel would.
fn run(filter: &Filter, architecture: u32, number: u32, arguments: &[u64]) -> u32 {
    let mut data = [0u32; 16];
    data[0] = number;
    data[1] = architecture;
    for (index, argument) in arguments.iter().enumerate() {
        data[4 + 2 * index] = *argument as u32;
        data[5 + 2 * index] = (*argument >> 32) as u32;
    }
    let (mut a, mut at) = (0, 0);
    loop {
        let i = Instruction::unpack(filter.program[at]);
        at += 1;
        let test = match i.code {
            bpf::LOAD => {
                a = data[i.k as usize / 4];
                continue;
            }
            bpf::AND => {
                a &= i.k;
                continue;
            }
            bpf::JUMP => {
                at += i.k as usize;
                continue;
            }
            bpf::RETURN => return i.k,
            bpf::JUMP_EQUAL => a == i.k,
            bpf::JUMP_GREATER => a > i.k,
            bpf::JUMP_GREATER_EQUAL => a >= i.k,
            other => panic!("unknown instruction {other:#x}"),
        };
        at += usize::from(if test { i.if_true } else { i.if_false });
    }
}

fn filter(json: &str) -> Filter {
    compile(&serde_json::from_str(json).unwrap()).unwrap()
}

fn native(filter: &Filter, number: libc::c_long, arguments: &[u64]) -> u32 {
    run(filter, bpf::ARCH_X86_64, number as u32, arguments)
}

#[test]
fn each_operator_compares_all_64_bits() {
    let big = 0x1_0000_0005u64;
    let table: &[(&str, u64, u64, u64, bool)] = &[
        ("EQ", big, 0, big, true),
        ("EQ", big, 0, 5, false),
        ("NE", big, 0, 5, true),
        ("NE", big, 0, 0x1_0000_0006, true),
        ("NE", big, 0, big, false),
        ("GT", big, 0, big, false),
        ("GT", big, 0, big + 1, true),
        ("GT", big, 0, 0xffff_ffff, false),
        ("GT", big, 0, 0x2_0000_0000, true),
        ("GE", big, 0, big, true),
        ("GE", big, 0, big - 1, false),
        ("GE", big, 0, 0x2_0000_0000, true),
        ("GE", big, 0, 7, false),
        ("LT", big, 0, big, false),
        ("LT", big, 0, big - 1, true),
        ("LT", big, 0, 0xffff_ffff, true),
        ("LT", big, 0, 0x2_0000_0000, false),
        ("LE", big, 0, big, true),
        ("LE", big, 0, big + 1, false),
        ("LE", big, 0, 0x2_0000_0001, false),
        ("LE", big, 0, 9, true),
        ("MASKED_EQ", 0x7e02_0000, 0, 0x1_0000_0011, true),
        ("MASKED_EQ", 0x7e02_0000, 0, 0x1000_0011, false),
        ("MASKED_EQ", 0xf_0000_000f, 0x1_0000_0001, 0x1_0000_0001, true),
        ("MASKED_EQ", 0xf_0000_000f, 0x1_0000_0001, 0x1, false),
    ];
    for (op, value, two, argument, holds) in table {
        // A second condition behind the first: a failing one must skip both.
        let rule = format!(
            r#"{{"names":["kill"],"action":"SCMP_ACT_ALLOW","args":[
                {{"index":1,"value":{value},"valueTwo":{two},"op":"SCMP_CMP_{op}"}},
                {{"index":0,"value":3,"op":"SCMP_CMP_EQ"}}]}}"#
        );
        let filter = filter(&format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{rule}]}}"#));
        let expected = if *holds { ALLOW } else { EPERM };
        assert_eq!(
            native(&filter, libc::SYS_kill, &[3, *argument]),
            expected,
            "{op} {value:#x} {argument:#x}"
        );
        assert_eq!(native(&filter, libc::SYS_kill, &[4, *argument]), EPERM, "{op} {value:#x} {argument:#x}");
    }
}

#[test]
fn rules_have_actions_of_their_own() {
    let filter = filter(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
            "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[
              {"names":["read","write","open","close","stat","no_such_call"],"action":"SCMP_ACT_ALLOW"},
              {"names":["mseal"],"action":"SCMP_ACT_ALLOW"},
              {"names":["clone"],"action":"SCMP_ACT_ALLOW",
               "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
              {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
              {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]},
              {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
              {"names":["reboot"],"action":"SCMP_ACT_KILL_PROCESS"}]}"#,
    );
    assert_eq!(native(&filter, libc::SYS_read, &[]), ALLOW);
    assert_eq!(native(&filter, libc::SYS_stat, &[]), ALLOW);
    assert_eq!(native(&filter, libc::SYS_mount, &[]), EPERM);
    assert_eq!(native(&filter, libc::SYS_clone3, &[]), ENOSYS);
    assert_eq!(native(&filter, libc::SYS_clone, &[0x11]), ALLOW);
    assert_eq!(native(&filter, libc::SYS_clone, &[0x1000_0011]), EPERM);
    assert_eq!(native(&filter, libc::SYS_personality, &[8]), ALLOW);
    assert_eq!(native(&filter, libc::SYS_personality, &[9]), EPERM);
    assert_eq!(native(&filter, libc::SYS_reboot, &[]), bpf::KILL_PROCESS);
    assert_eq!(native(&filter, 463, &[]), ENOSYS, "newer than all that the profile knows");
    assert_eq!(native(&filter, 0x4000_0000, &[]), ALLOW, "read of x32");
    assert_eq!(run(&filter, bpf::ARCH_I386, 3, &[]), ALLOW, "read of 32-bit x86");
    assert_eq!(run(&filter, bpf::ARCH_I386, 21, &[]), EPERM, "mount of 32-bit x86");
    assert_eq!(run(&filter, 0xc000_00b7, 63, &[]), bpf::KILL_PROCESS, "another architecture");
}

#[test]
fn a_profile_of_exceptions_allows_the_rest() {
    let filter = filter(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["unshare"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#,
    );
    assert_eq!(native(&filter, libc::SYS_unshare, &[]), bpf::ERRNO | 13);
    assert_eq!(native(&filter, 463, &[]), ALLOW);
    assert_eq!(native(&filter, 0x4000_0000, &[]), bpf::KILL_PROCESS, "x32 is not named");
    assert_eq!(run(&filter, bpf::ARCH_I386, 3, &[]), bpf::KILL_PROCESS, "32-bit x86 is not named");
}

#[test]
fn long_rules_are_jumped_over() {
    let conditions: Vec<String> =
        (0..120).map(|n| format!(r#"{{"index":0,"value":{n},"op":"SCMP_CMP_EQ"}}"#)).collect();
    let filter = filter(&format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {{"names":["ioctl"],"action":"SCMP_ACT_ALLOW","args":[{}]}},
            {{"names":["mseal"],"action":"SCMP_ACT_ALLOW"}}]}}"#,
        conditions.join(",")
    ));
    assert_eq!(
        native(&filter, libc::SYS_ioctl, &[119]),
        ALLOW,
        "conditions on one argument are alternatives"
    );
    assert_eq!(native(&filter, libc::SYS_ioctl, &[120]), EPERM);
    assert_eq!(native(&filter, 462, &[]), ALLOW);
}

#[test]
fn what_cannot_be_enforced_is_refused() {
    let profile = |json: &str| compile(&serde_json::from_str(json).unwrap());
    assert!(matches!(profile(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#), Err(Error::Notify)));
    assert!(matches!(
        profile(r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":65536}"#),
        Err(Error::Errno(65536))
    ));
    let argument = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["kill"],"action":"SCMP_ACT_ERRNO",
        "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#;
    assert!(matches!(profile(argument), Err(Error::Argument(_, 6))));
}

#[test]
fn the_table_is_sorted_and_true() {
    assert!(syscalls::TABLE.is_sorted_by(|a, b| a.0 < b.0));
    let number =
        |name: &str| syscalls::TABLE.iter().find(|names| names.0 == name).map(|names| i64::from(names.1));
    assert_eq!(number("execve"), Some(libc::SYS_execve));
    assert_eq!(number("openat2"), Some(libc::SYS_openat2));
    assert_eq!(number("mount_setattr"), Some(libc::SYS_mount_setattr));
    assert_eq!(number("socketcall"), Some(-1));
}

/// Any profile: what is made of it is a program that ends, with an action of the profile.
#[test]
fn fuzz_seccomp() {
    katana_fuzz::fuzz("seccomp", |input| {
        let numbers: Vec<u32> = (0..4).map(|_| input.u16().into()).collect();
        let Ok(profile) = serde_json::from_slice(input.rest()) else { return };
        let Ok(filter) = compile(&profile) else { return };
        assert!(filter.program.len() <= MAX_INSTRUCTIONS);
        for number in numbers {
            for architecture in [bpf::ARCH_X86_64, 0x4000_0003, 0] {
                run(&filter, architecture, number, &[0; 6]);
            }
        }
    });
}
