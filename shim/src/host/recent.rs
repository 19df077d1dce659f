//! The last of what happened, for who looks later or follows.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// The last things of a kind, as many as fit into a limit.
pub struct Recent<T> {
    limit: usize,
    kept: Mutex<Kept<T>>,
    /// How many there have been.
    count: watch::Sender<u64>,
}

struct Kept<T> {
    /// Each with what it counts against the limit.
    items: VecDeque<(T, usize)>,
    size: usize,
}

impl<T: Clone> Recent<T> {
    /// Keeps what counts no more than this together.
    pub fn new(limit: usize) -> Self {
        let kept = Kept { items: VecDeque::new(), size: 0 };
        Self { limit, kept: Mutex::new(kept), count: watch::channel(0).0 }
    }

    /// Adds one, and forgets the oldest ones that do not fit any more.
    pub fn push(&self, item: T, size: usize) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.items.push_back((item, size));
        kept.size = kept.size.saturating_add(size);
        while kept.size > self.limit
            && let Some((_, size)) = kept.items.pop_front()
        {
            kept.size -= size.min(kept.size);
        }
        self.count.send_modify(|count| *count += 1);
    }

    /// Those after the first `count` ones that are kept still, and how many there have been.
    pub fn after(&self, count: u64) -> (Vec<T>, u64) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let now = *self.count.borrow();
        let new = usize::try_from(now.saturating_sub(count)).unwrap_or(usize::MAX);
        let known = kept.items.len().saturating_sub(new);
        (kept.items.iter().skip(known).map(|(item, _)| item.clone()).collect(), now)
    }

    /// The same, once there is one.
    pub async fn next(&self, count: u64) -> (Vec<T>, u64) {
        // The sender is here, so it cannot fail.
        let _ = self.count.subscribe().wait_for(|now| *now > count).await;
        self.after(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn the_last_ones_are_kept_and_new_ones_are_waited_for() {
        let recent = Recent::new(10);
        assert_eq!(recent.after(0), (vec![], 0));
        assert!(recent.next(0).now_or_never().is_none());
        for item in 0..5 {
            recent.push(item, 3);
        }
        assert_eq!(recent.after(0), (vec![2, 3, 4], 5));
        assert_eq!(recent.after(4), (vec![4], 5));
        assert_eq!(recent.after(5), (vec![], 5));
        assert_eq!(recent.next(3).now_or_never(), Some((vec![3, 4], 5)));
        recent.push(9, 100);
        assert_eq!(recent.after(0), (vec![], 6));
    }
}
