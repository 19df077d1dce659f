// For tests, which include this file: an older kernel, as far as one thread is concerned.

use std::io::Error;

/// Does something on a thread for which the kernel has no call of this name: a seccomp program (seccomp(2), bpf(4))
/// lets it fail with ENOSYS, and lets all others through.
pub fn without<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
    let number = match name {
        "open_tree" => libc::SYS_open_tree,
        "move_mount" => libc::SYS_move_mount,
        "fsopen" => libc::SYS_fsopen,
        "fsconfig" => libc::SYS_fsconfig,
        "fsmount" => libc::SYS_fsmount,
        "mount_setattr" => libc::SYS_mount_setattr,
        "openat2" => libc::SYS_openat2,
        "pidfd_send_signal" => libc::SYS_pidfd_send_signal,
        "pidfd_open" => libc::SYS_pidfd_open,
        "clone3" => libc::SYS_clone3,
        "setns" => libc::SYS_setns,
        "close_range" => libc::SYS_close_range,
        // Every kernel has it; where it fails, nothing can be waited for.
        "epoll_ctl" => libc::SYS_epoll_ctl,
        other => panic!("{other}"),
    };
    let step = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        // The call's number is the first word of seccomp_data.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number as u32, 0, 1),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let thread = || {
        let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: numbers, and a program that outlives the call.
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
        };
        assert!(installed, "{}", Error::last_os_error());
        work()
    };
    std::thread::scope(|scope| scope.spawn(thread).join().unwrap())
}
