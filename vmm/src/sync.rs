//! Locks in a program that aborts on panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`. A lock is poisoned by a panic only, and a panic ends this process.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
