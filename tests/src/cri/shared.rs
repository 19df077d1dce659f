//! One ordinary pod of each handler of each containerd for all cases that only need a container.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Once, PoisonError};

use super::Pod;
use crate::Containerd;

/// By containerd and handler.
type Pods = HashMap<(Containerd, String), Arc<Pod>>;

static PODS: Mutex<Option<Pods>> = Mutex::new(None);

/// The pod that cases share. It lives until the tests end.
///
/// # Panics
/// When it cannot be run.
#[track_caller]
pub fn shared_pod(handler: &str) -> Arc<Pod> {
    extern "C" fn remove_all() {
        drop(PODS.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
    static REGISTER: Once = Once::new();
    // Statics are not dropped.
    // SAFETY: the function is safe to call at exit: it takes a lock that nobody holds for long, and talks to
    // containerd.
    REGISTER.call_once(|| unsafe {
        libc::atexit(remove_all);
    });
    let mut pods = PODS.lock().unwrap_or_else(PoisonError::into_inner);
    let pods = pods.get_or_insert_default();
    Arc::clone(
        pods.entry((Containerd::current(), handler.to_owned()))
            .or_insert_with(|| Arc::new(Pod::run(handler))),
    )
}
