//! containerd's default profile, as it is felt: contrib/seccomp/seccomp_default.go of containerd.

use libc::{ENOSYS, EPERM};

use super::{Findings, checked};

/// Calls that even an unprivileged process may make without a filter, so that only the filter can refuse them. All
/// arguments are 0, or what is given.
#[test]
#[ignore = "runs inside a container"]
fn refused_calls() {
    const CLONE_NEWUSER: i64 = 0x1000_0000;
    let cases = [
        ("keyctl", libc::SYS_keyctl, 0, EPERM),
        ("add_key", libc::SYS_add_key, 0, EPERM),
        ("request_key", libc::SYS_request_key, 0, EPERM),
        ("unshare of the user namespace", libc::SYS_unshare, CLONE_NEWUSER, EPERM),
        ("userfaultfd", libc::SYS_userfaultfd, 0, EPERM),
        ("perf_event_open", libc::SYS_perf_event_open, 0, EPERM),
        ("personality", libc::SYS_personality, 0x0400_0000, EPERM),
        ("bpf", libc::SYS_bpf, 0, EPERM),
        ("mount", libc::SYS_mount, 0, EPERM),
        ("kexec_load", libc::SYS_kexec_load, 0, EPERM),
        // With this answer the C library falls back to clone, whose flags a filter can see.
        ("clone3", libc::SYS_clone3, 0, ENOSYS),
    ];
    let mut findings = Findings::default();
    for (name, number, argument, expected) in cases {
        // SAFETY: refused calls do nothing, and allowed ones get null pointers and fail.
        let result = checked(unsafe { libc::syscall(number, argument, 0_i64, 0_i64, 0_i64, 0_i64) });
        findings.expect_errno(name, result, expected);
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn allowed_calls() {
    // SAFETY: none of these takes a pointer.
    let results = unsafe {
        [
            ("getpid", checked(libc::syscall(libc::SYS_getpid))),
            ("personality, asked", checked(libc::syscall(libc::SYS_personality, 0xffff_ffff_i64))),
            ("memfd_create", checked(libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0_i64))),
            ("umask", checked(libc::syscall(libc::SYS_umask, 0o22_i64))),
            ("sched_yield", checked(libc::syscall(libc::SYS_sched_yield))),
        ]
    };
    let mut findings = Findings::default();
    for (name, result) in results {
        findings.expect_errno(name, result, 0);
    }
    findings.none();
}
