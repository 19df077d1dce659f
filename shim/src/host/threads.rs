//! Threads beside the one that serves. Where the host has none left, that is an error like others: tokio's own pool
//! panics, and with the shim its pod would end.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, ThreadId};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

use crate::error::{Error, Result};

/// Threads at once for what blocks.
const MOST: usize = 4;
/// How long one of them waits for more to do.
const IDLE_LIMIT: Duration = Duration::from_secs(1);
/// How long work waits for a thread when the host has none left: others end.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for what would be left behind without one. It is done by the thread that serves then.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(3);
/// From one attempt to the next.
const RETRY: Duration = Duration::from_millis(50);
/// Of work that is waited for at the end.
const MOST_STARTED: u32 = 1024;
/// The kernel likes to give a stack of 2 MiB, the default, a huge page.
const STACK: usize = 512 * 1024;

type Job = Box<dyn FnOnce() + Send>;

static TURNS: Semaphore = Semaphore::const_new(MOST);
/// What has been started and not ended, see [`finish`].
static STARTED: Semaphore = Semaphore::const_new(MOST_STARTED as usize);
/// Threads that wait for something to do.
static IDLE: Mutex<Vec<(ThreadId, Sender<Job>)>> = Mutex::new(Vec::new());

/// Runs what blocks. Once it has a thread, it goes on when nobody waits for it any more.
///
/// # Errors
/// What the work says, or [`Error::Host`] when there is no thread for it.
pub async fn blocking<T, F>(work: F) -> Result<T>
where
    F: FnOnce() -> Result<T> + Send + 'static,
    T: Send + 'static,
{
    let turn = TURNS.acquire().await.map_err(|e| Error::Host(e.to_string()))?;
    let (job, done) = job(work, Some(turn));
    start_within(PATIENCE, job).await.map_err(|(_, e)| Error::io("thread", &e))?;
    done.await.map_err(|e| Error::Host(e.to_string()))?
}

/// The same for what removes what is left of a container or a machine. It does not queue behind other work, some of
/// which may never end (a file server that is silent), and is done in any case: without a thread by this one, while
/// nothing else is served.
///
/// # Errors
/// What the work says.
pub async fn cleanup<T, F>(work: F) -> Result<T>
where
    F: FnOnce() -> Result<T> + Send + 'static,
    T: Send + 'static,
{
    let (job, done) = job(work, None);
    if let Err((job, e)) = start_within(CLEANUP_PATIENCE, job).await {
        log::warn!("thread: {e}");
        job();
    }
    done.await.map_err(|e| Error::Host(e.to_string()))?
}

/// Waits for the end of all work that has been started, but not longer than this.
pub async fn finish(limit: Duration) {
    if tokio::time::timeout(limit, STARTED.acquire_many(MOST_STARTED)).await.is_err() {
        log::warn!("not all work has ended");
    }
}

/// The work, and what comes of it.
fn job<T, F>(work: F, turn: Option<SemaphorePermit<'static>>) -> (Job, oneshot::Receiver<Result<T>>)
where
    F: FnOnce() -> Result<T> + Send + 'static,
    T: Send + 'static,
{
    let (sender, done) = oneshot::channel();
    let started = STARTED.try_acquire().ok();
    let job = move || {
        let outcome = work();
        drop((turn, started));
        // Nobody waits any more.
        let _ = sender.send(outcome);
    };
    (Box::new(job), done)
}

/// Starts the job, again and again until there is a thread for it; or else it comes back.
async fn start_within(patience: Duration, mut job: Job) -> std::result::Result<(), (Job, io::Error)> {
    let until = Instant::now() + patience;
    while let Err((again, e)) = start(job) {
        if Instant::now() >= until {
            return Err((again, e));
        }
        job = again;
        tokio::time::sleep(RETRY).await;
    }
    Ok(())
}

/// Runs what changes its thread's namespaces or working directory on a thread that ends with it.
///
/// # Errors
/// What the work says, or that there is no thread for it.
pub fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let work = Mutex::new(Some(work));
    let run = || match work.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(work) => work(),
        None => Err(io::Error::other("the work is done already")),
    };
    let until = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        loop {
            match Builder::new().stack_size(STACK).spawn_scoped(scope, run) {
                Ok(started) => {
                    return started.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
                }
                Err(e) if Instant::now() >= until => return Err(e),
                Err(_) => thread::sleep(RETRY),
            }
        }
    })
}

/// Starts a thread for what nobody waits for; without one, the work is dropped.
///
/// # Errors
/// When there is no thread for it.
pub fn detached(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    start(Box::new(work)).map_err(|(_, e)| e)
}

fn idle() -> MutexGuard<'static, Vec<(ThreadId, Sender<Job>)>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the job to a thread, or back.
fn start(job: Job) -> std::result::Result<(), (Job, io::Error)> {
    let waiting = idle().pop();
    let job = match waiting {
        None => job,
        // It has ended all the same if the job comes back.
        Some((_, jobs)) => match jobs.send(job) {
            Ok(()) => return Ok(()),
            Err(mpsc::SendError(job)) => job,
        },
    };
    let (sender, jobs) = mpsc::channel();
    let own = sender.clone();
    match Builder::new().name("blocking".into()).stack_size(STACK).spawn(move || serve(&own, &jobs)) {
        Ok(_) => sender.send(job).map_err(|mpsc::SendError(job)| (job, io::ErrorKind::BrokenPipe.into())),
        Err(e) => Err((job, e)),
    }
}

fn serve(sender: &Sender<Job>, jobs: &Receiver<Job>) {
    let own = thread::current().id();
    let Ok(mut job) = jobs.recv() else { return };
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinHandle;

    use super::*;

    /// Held by each test: they count the same threads and turns.
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    /// Work that has begun, and ends when the sender is dropped.
    async fn held() -> (Sender<()>, JoinHandle<Result<()>>) {
        let (end, ends) = mpsc::channel();
        let (begin, begun) = oneshot::channel();
        let task = tokio::spawn(blocking(move || {
            let _ = begin.send(());
            let _ = ends.recv();
            Ok(())
        }));
        begun.await.unwrap();
        (end, task)
    }

    #[tokio::test]
    async fn work_is_done_by_a_few_threads_that_end() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..100)
            .map(|number| {
                let (now, most) = (Arc::clone(&now), Arc::clone(&most));
                tokio::spawn(blocking(move || {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(2));
                    now.fetch_sub(1, Ordering::SeqCst);
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
        assert!(most.load(Ordering::SeqCst) <= MOST);
        let failed = blocking(|| Err::<(), _>(Error::NotFound("x".into()))).await.unwrap_err();
        assert_eq!(failed.to_string(), "x: not found");
        while idle().iter().any(|(thread, _)| threads.contains(thread)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn cleanup_does_not_wait_for_work_that_hangs() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let mut hung = Vec::new();
        for _ in 0..MOST {
            hung.push(held().await);
        }
        assert_eq!(TURNS.available_permits(), 0);
        assert_eq!(cleanup(|| Ok(7)).await.unwrap(), 7);
        for (end, task) in hung {
            drop(end);
            task.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_goes_on_and_the_end_waits_for_it() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let (end, task) = held().await;
        task.abort();
        task.await.unwrap_err();
        finish(Duration::from_millis(50)).await;
        assert!(STARTED.available_permits() < MOST_STARTED as usize, "it has ended");
        drop(end);
        finish(Duration::from_secs(600)).await;
        assert_eq!(STARTED.available_permits(), MOST_STARTED as usize);
    }
}
