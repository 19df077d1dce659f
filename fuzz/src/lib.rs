//! Fuzzing: what every target has in common.
//!
//! A target is a test named `fuzz...` of the crate whose code it tries, since most of that is private to programs. It
//! calls [`fuzz`] with a name and a function of an [`Input`]. Inputs are made of the corpus, the files in
//! `corpus/NAME`, and at random, from a seed; a target fails by a panic, or by not coming to an end. What it failed
//! with is kept in a file.
//!
//! Run by `cargo test`, each target takes a second. `scripts/fuzz` runs them for as long as it is asked to, with what
//! the environment says here:
//!
//! * `KATANA_FUZZ_SECONDS`: how long each target runs
//! * `KATANA_FUZZ_SEED`: from which number inputs are made
//! * `KATANA_FUZZ_INPUT`: a file, the only input
//! * `KATANA_FUZZ_FOUND`: a directory for inputs that reached code that none before had reached, in which those of
//!   earlier runs are looked for as well; only in programs that count what is executed (see `coverage.rs`)

mod coverage;
mod input;
mod random;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coverage::Coverage;
pub use input::Input;
use random::Random;

/// Longest input, in bytes.
const LONGEST: usize = 4096;
/// Most inputs of a run's own corpus.
const MOST_KEPT: usize = 4096;
/// An input that takes longer than this, on however busy a machine, does not come to an end.
const HANGS: Duration = Duration::from_secs(120);

/// What the environment says.
struct Settings {
    name: &'static str,
    time: Duration,
    seed: u64,
    found: Option<PathBuf>,
}

/// The input that is being tried, for the thread that watches.
type Current = Arc<Mutex<Option<(Instant, Vec<u8>)>>>;

/// Tries inputs on a target until the time is over.
///
/// # Panics
/// When the target does, or the environment makes no sense.
#[track_caller]
pub fn fuzz(name: &'static str, mut target: impl FnMut(&mut Input<'_>)) {
    let number = |variable: &str, default: f64| {
        std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
    };
    let settings = Settings {
        name,
        time: Duration::from_secs_f64(number("KATANA_FUZZ_SECONDS", 1.0)),
        seed: number("KATANA_FUZZ_SEED", 1.0) as u64,
        found: std::env::var_os("KATANA_FUZZ_FOUND").map(|directory| Path::new(&directory).join(name)),
    };
    if let Some(file) = std::env::var_os("KATANA_FUZZ_INPUT") {
        let bytes = fs::read(&file).expect("the file that KATANA_FUZZ_INPUT names");
        return target(&mut Input::new(&bytes));
    }
    settings.run(&mut target);
}

impl Settings {
    fn run(&self, target: &mut impl FnMut(&mut Input<'_>)) {
        let mut corpus = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name));
        corpus.extend(self.found.iter().flat_map(|directory| files(directory)));
        let (given, current) = (corpus.len(), Current::default());
        self.watch(&current);
        let (mut random, mut coverage) = (Random::new(self.seed), Coverage::default());
        let (start, mut tried, mut reached) = (Instant::now(), 0_usize, 0_usize);
        // First what is known, as it is.
        while tried < given || start.elapsed() < self.time {
            let bytes = corpus.get(tried).filter(|_| tried < given).cloned();
            let bytes = bytes.unwrap_or_else(|| random.input(&corpus, LONGEST));
            *lock(&current) = Some((Instant::now(), bytes.clone()));
            let result = catch_unwind(AssertUnwindSafe(|| target(&mut Input::new(&bytes))));
            *lock(&current) = None;
            if let Err(panic) = result {
                eprintln!(
                    "fuzz: {}: input {tried} of seed {} is {}",
                    self.name,
                    self.seed,
                    self.keep(&bytes)
                );
                resume_unwind(panic);
            }
            tried += 1;
            if coverage.is_new() && tried > given {
                reached += 1;
                self.find(&bytes);
                if corpus.len() < MOST_KEPT {
                    corpus.push(bytes);
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "fuzz: {}: {tried} inputs in {seconds:.1} s, {given} of the corpus, {reached} new, seed {}",
            self.name, self.seed
        );
    }

    /// Ends this process when an input does not come to an end.
    fn watch(&self, current: &Current) {
        let (current, name, seed) = (Arc::downgrade(current), self.name, self.seed);
        std::thread::spawn(move || {
            while let Some(current) = current.upgrade() {
                if let Some((since, bytes)) = &*lock(&current)
                    && since.elapsed() > HANGS
                {
                    let kept = keep(name, seed, bytes);
                    eprintln!("fuzz: {name}: an input does not come to an end, it is {kept}");
                    std::process::abort();
                }
                drop(current);
                std::thread::sleep(Duration::from_secs(1));
            }
        });
    }

    fn keep(&self, bytes: &[u8]) -> String {
        keep(self.name, self.seed, bytes)
    }

    fn find(&self, bytes: &[u8]) {
        if let Some(directory) = &self.found {
            let file = directory.join(format!("{:016x}", Random::hash(bytes)));
            let written = fs::create_dir_all(directory).and_then(|()| fs::write(&file, bytes));
            written.expect("the directory that KATANA_FUZZ_FOUND names");
        }
    }
}

/// Writes an input down; where.
fn keep(name: &str, seed: u64, bytes: &[u8]) -> String {
    let file = std::env::temp_dir().join(format!("katana-fuzz-{name}-{seed}"));
    match fs::write(&file, bytes) {
        Ok(()) => file.display().to_string(),
        Err(error) => format!("{bytes:02x?} ({}: {error})", file.display()),
    }
}

/// The contents of a directory's files, in the order of their names; nothing if there is no directory.
fn files(directory: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_fails_is_found_and_its_input_kept() {
        let seed = std::env::var("KATANA_FUZZ_SEED").unwrap_or_else(|_| "1".to_owned());
        let file = std::env::temp_dir().join(format!("katana-fuzz-self-{seed}"));
        let _ = fs::remove_file(&file);
        let found = catch_unwind(|| {
            fuzz("self", |input| assert!(input.u8() != b'k' || input.u8() < 128, "found"));
        });
        assert!(found.is_err());
        let kept = fs::read(&file).unwrap();
        assert!(kept[0] == b'k' && kept[1] >= 128);
    }

    #[test]
    fn the_same_seed_makes_the_same_inputs() {
        let inputs = |seed| {
            let mut random = Random::new(seed);
            let corpus = [b"corpus".to_vec()];
            (0..100).map(|_| random.input(&corpus, LONGEST)).collect::<Vec<_>>()
        };
        assert_eq!(inputs(1), inputs(1));
        assert_ne!(inputs(1), inputs(2));
        assert!(inputs(3).iter().all(|input| input.len() <= LONGEST));
    }
}
