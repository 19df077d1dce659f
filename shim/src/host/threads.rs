//! Threads beside the one that serves. Where the host has none left, that is an error like others: tokio's own pool
//! panics, and with the shim its pod would end.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, ThreadId};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use crate::error::{Error, Result};

/// Threads at once for what blocks.
const MOST: usize = 4;
/// How long one of them waits for more to do.
const IDLE_LIMIT: Duration = Duration::from_secs(1);
/// The kernel likes to give a stack of 2 MiB, the default, a huge page.
const STACK: usize = 512 * 1024;

type Job = Box<dyn FnOnce() + Send>;

static TURNS: Semaphore = Semaphore::const_new(MOST);
/// Threads that wait for something to do.
static IDLE: Mutex<Vec<(ThreadId, Sender<Job>)>> = Mutex::new(Vec::new());

/// Runs what blocks. It goes on when nobody waits for it any more.
///
/// # Errors
/// What the work says, or [`Error::Host`] when there is no thread for it.
pub async fn blocking<T, F>(work: F) -> Result<T>
where
    F: FnOnce() -> Result<T> + Send + 'static,
    T: Send + 'static,
{
    let turn = TURNS.acquire().await.map_err(|e| Error::Host(e.to_string()))?;
    let (sender, done) = oneshot::channel();
    let job = Box::new(move || {
        let outcome = work();
        drop(turn);
        // Nobody waits any more.
        let _ = sender.send(outcome);
    });
    start(job).map_err(|e| Error::io("thread", &e))?;
    done.await.map_err(|e| Error::Host(e.to_string()))?
}

/// Runs what changes its thread's namespaces or working directory on a thread that ends with it.
///
/// # Errors
/// What the work says, or that there is no thread for it.
pub fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let started = Builder::new().stack_size(STACK).spawn_scoped(scope, work)?;
        started.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// Starts a thread for what nobody waits for; without one, the work is dropped.
///
/// # Errors
/// When there is no thread for it.
pub fn detached(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    start(Box::new(work))
}

fn idle() -> MutexGuard<'static, Vec<(ThreadId, Sender<Job>)>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(job: Job) -> io::Result<()> {
    let waiting = idle().pop();
    let job = match waiting {
        None => job,
        // It has ended all the same if the job comes back.
        Some((_, jobs)) => match jobs.send(job) {
            Ok(()) => return Ok(()),
            Err(mpsc::SendError(job)) => job,
        },
    };
    Builder::new().name("blocking".into()).stack_size(STACK).spawn(move || serve(job)).map(drop)
}

fn serve(mut job: Job) {
    let (sender, jobs) = mpsc::channel();
    let own = thread::current().id();
    loop {
        job();
        idle().push((own, sender.clone()));
        job = match jobs.recv_timeout(IDLE_LIMIT) {
            Ok(next) => next,
            Err(_) => {
                let mut idle = idle();
                if let Some(at) = idle.iter().position(|(thread, _)| *thread == own) {
                    idle.swap_remove(at);
                    return;
                }
                drop(idle);
                // Somebody has just taken this thread, and is about to send.
                match jobs.recv() {
                    Ok(next) => next,
                    Err(_) => return,
                }
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[tokio::test]
    async fn work_is_done_by_a_few_threads_that_end() {
        let tasks: Vec<_> = (0..100)
            .map(|number| {
                tokio::spawn(blocking(move || {
                    thread::sleep(Duration::from_millis(2));
                    Ok((number, thread::current().id()))
                }))
            })
            .collect();
        let mut threads = HashSet::new();
        for (expected, task) in tasks.into_iter().enumerate() {
            let (number, thread) = task.await.unwrap().unwrap();
            assert_eq!(number, expected);
            threads.insert(thread);
        }
        // Other tests of this process use them as well.
        assert!(threads.len() < 100, "{}", threads.len());
        let failed = blocking(|| Err::<(), _>(Error::NotFound("x".into()))).await.unwrap_err();
        assert_eq!(failed.to_string(), "x: not found");
        while idle().iter().any(|(thread, _)| threads.contains(thread)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn work_goes_on_when_nobody_waits() {
        let (sender, done) = oneshot::channel();
        let work = blocking(move || {
            thread::sleep(Duration::from_millis(50));
            let _ = sender.send(());
            Ok(())
        });
        tokio::time::timeout(Duration::from_millis(5), work).await.unwrap_err();
        done.await.unwrap();
    }
}
