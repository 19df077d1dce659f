//! Threads that do nothing. Clients of the host know a container by a process of theirs, and look up namespaces and
//! cgroups by its id. A pod's containers are all in this process, so each but the first gets a thread of it to be known
//! by.
//!
//! They are made without the C library. Its threads allocate memory and look around in /sys and /proc when they begin
//! and end, so they would need several pages each, and rights that nobody else needs here.

use std::arch::asm;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::io;
use std::ptr::{NonNull, from_ref, null_mut};
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_long};
use nix::sys::signal::{SigSet, SigmaskHow};

use crate::seccomp::Kind;

/// Flags of clone(2), which the main thread's filter knows.
const THREAD: c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;
/// The rest of a page: what [`wait`] and what it calls need, many times over.
const STACK: usize = 4096 - 32;

/// States of a thread; a negative number is the error with which it ends.
const STARTS: i32 = 0;
const WAITS: i32 = 1;
const TO_END: i32 = 2;

/// A thread's memory: one page.
#[repr(C, align(16))]
struct Page {
    state: AtomicI32,
    /// The thread's id. The kernel makes it 0 when the thread is gone, and wakes who waits.
    id: AtomicI32,
    /// Valid as long as the thread starts.
    filter: libc::sock_fprog,
    stack: UnsafeCell<[u8; STACK]>,
}

const _: () = assert!(size_of::<Page>() == 4096);

/// A thread that waits in one system call until it is ended; or else until the process ends.
pub struct Placeholder {
    memory: NonNull<Page>,
    id: i32,
}

/// Why there is no thread.
#[derive(Debug, thiserror::Error)]
#[error("thread for a container: {0}")]
pub struct Error(io::Error);

impl Placeholder {
    /// Starts the thread, confined. The main thread's filter allows what that needs.
    ///
    /// # Errors
    /// When there can be no more threads, or it cannot be confined.
    pub fn start() -> Result<Self, Error> {
        let mut program = Kind::Placeholder.program();
        let len = program.len().try_into().map_err(|_| Error(io::ErrorKind::InvalidData.into()))?;
        let memory = memory(libc::sock_fprog { len, filter: program.as_mut_ptr().cast() }).map_err(Error)?;
        let started = start(memory);
        if started.is_ok() {
            // SAFETY: the memory goes in `leave` only.
            let memory = unsafe { memory.as_ref() };
            while memory.state.load(Ordering::Acquire) == STARTS {
                futex(&memory.state, libc::FUTEX_WAIT, STARTS);
            }
        }
        // The kernel has its own copy of the filter now.
        drop(program);
        // SAFETY: as above.
        let state = unsafe { memory.as_ref() }.state.load(Ordering::Acquire);
        match started {
            Ok(id) if state == WAITS => Ok(Self { memory, id }),
            failed => {
                leave(memory);
                Err(Error(failed.err().unwrap_or_else(|| io::Error::from_raw_os_error(-state))))
            }
        }
    }

    /// Its id, in the pid namespace of the jail.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Ends it.
    pub fn end(self) {
        // SAFETY: the memory goes in `leave` only.
        let state = &unsafe { self.memory.as_ref() }.state;
        state.store(TO_END, Ordering::Release);
        futex(state, libc::FUTEX_WAKE, 1);
        leave(self.memory);
    }
}

/// Not from the heap, which has ways of its own to give memory back.
fn memory(filter: libc::sock_fprog) -> io::Result<NonNull<Page>> {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, wherever the kernel likes.
    let page = unsafe { libc::mmap(null_mut(), size_of::<Page>(), access, flags, -1, 0) };
    let memory = NonNull::new(page.cast::<Page>()).filter(|_| page != libc::MAP_FAILED);
    let memory = memory.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the mapping is as large as a memory, and nobody else's. The stack is as good as any with the zeros in it.
    unsafe {
        (&raw mut (*memory.as_ptr()).state).write(AtomicI32::new(STARTS));
        (&raw mut (*memory.as_ptr()).id).write(AtomicI32::new(0));
        (&raw mut (*memory.as_ptr()).filter).write(filter);
    }
    Ok(memory)
}

fn start(memory: NonNull<Page>) -> io::Result<i32> {
    // Handlers of signals use what is a thread's own, and this one has nothing of the kind.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the memory is there until the thread is gone, and the pointers are to members of it. The top of the stack
    // is aligned, as the memory's and the stack's sizes are. The thread shares this one's thread-local memory, which
    // `wait` does not touch.
    let id = unsafe {
        let (stack, id) = ((*memory.as_ptr()).stack.get(), from_ref(&(*memory.as_ptr()).id));
        let (top, tls) = (stack.add(1).cast(), null_mut::<c_void>());
        libc::clone(wait, top, THREAD, memory.as_ptr().cast(), id, tls, id)
    };
    let error = io::Error::last_os_error();
    // Takes any mask.
    let _ = mask.thread_set_mask();
    if id < 0 { Err(error) } else { Ok(id) }
}

/// Waits until there is no thread in the memory, and removes it.
fn leave(memory: NonNull<Page>) {
    // SAFETY: nobody removes it but this function, which has it to itself.
    let id = &unsafe { memory.as_ref() }.id;
    loop {
        match id.load(Ordering::Acquire) {
            0 => break,
            lives => futex(id, libc::FUTEX_WAIT, lives),
        }
    }
    // SAFETY: it is the mapping of `memory`, and the kernel has said that the thread does not use it any more.
    unsafe { libc::munmap(memory.as_ptr().cast(), size_of::<Page>()) };
}

/// The thread. Whatever needs thread-local memory, as the C library does for errno, is not to be called here. Back in
/// clone(3), it ends.
extern "C" fn wait(memory: *mut c_void) -> c_int {
    // SAFETY: it is the memory that the thread was started with, which is there for as long as the thread is.
    let memory = unsafe { &*memory.cast::<Page>() };
    let mode = libc::SECCOMP_SET_MODE_FILTER as usize;
    // SAFETY: the filter is valid: whoever has started this thread waits for the next state.
    let confined = unsafe { call(libc::SYS_seccomp, [mode, 0, from_ref(&memory.filter) as usize, 0]) };
    memory.state.store(if confined == 0 { WAITS } else { confined as i32 }, Ordering::Release);
    futex(&memory.state, libc::FUTEX_WAKE, 1);
    while memory.state.load(Ordering::Acquire) == WAITS {
        futex(&memory.state, libc::FUTEX_WAIT, WAITS);
    }
    0
}

/// Waits for as long as the word has this value, or wakes so many that wait. Comes back without a reason at times.
fn futex(word: &AtomicI32, operation: c_int, value: i32) {
    // SAFETY: the kernel reads one word, and there is no timeout.
    unsafe { call(libc::SYS_futex, [from_ref(word) as usize, operation as usize, value as usize, 0]) };
}

/// A system call, without the C library.
///
/// # Safety
/// As for the system call.
unsafe fn call(number: c_long, [first, second, third, fourth]: [usize; 4]) -> isize {
    let result;
    // SAFETY: by contract the call is sound, and the kernel changes these registers only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") fourth,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    fn status(id: i32) -> Option<String> {
        std::fs::read_to_string(format!("/proc/self/task/{id}/status")).ok()
    }

    #[test]
    fn a_thread_waits_until_it_is_ended() {
        nix::sys::prctl::set_no_new_privs().unwrap();
        let (one, two) = (Placeholder::start().unwrap(), Placeholder::start().unwrap());
        assert_ne!(one.id(), two.id());
        let confined = status(one.id()).unwrap();
        assert!(confined.lines().any(|line| line == "Seccomp:\t2"), "{confined}");
        let id = one.id();
        one.end();
        // The kernel says that a thread has ended a moment before it takes it out of /proc.
        for _ in 0..1000 {
            if status(id).is_none() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(status(id), None);
        assert!(status(two.id()).is_some());
        two.end();
    }

    #[test]
    fn the_main_thread_may_start_it() {
        // SAFETY: the child uses no lock that another thread of the test could hold but that of the allocator, which
        // the C library keeps usable across fork, and leaves by _exit.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                nix::sys::prctl::set_no_new_privs().unwrap();
                seccomp::install(Kind::Main).unwrap();
                for _ in 0..3 {
                    let threads: Vec<_> = (0..50).map(|_| Placeholder::start().unwrap()).collect();
                    threads.into_iter().for_each(Placeholder::end);
                }
                // SAFETY: _exit does not come back.
                unsafe { libc::_exit(0) }
            }
        };
        let end = waitpid(child, None).unwrap();
        assert!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
    }
}
