//! Huge pages, set aside for containers that have a limit of them: there are as many as may be used.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::LinuxResources;

/// What cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size that is none, or that the CPU does not have.
    #[error("huge pages of {0:?}: there is no such size")]
    Size(String),
    /// The kernel does not take the number.
    #[error("huge pages of {0:?}: {1}")]
    Kernel(String, io::Error),
    /// There is not so much memory in one piece.
    #[error("huge pages of {size:?}: {wanted} are wanted, and memory was found for {found}")]
    Memory {
        /// Of a page.
        size: String,
        /// For all containers.
        wanted: u64,
        /// Of them.
        found: u64,
    },
}

/// What is set aside for one container. Given back when this is dropped.
#[derive(Debug, Default)]
pub struct HugePages(Vec<Reserved>);

#[derive(Debug)]
struct Reserved {
    size: String,
    file: PathBuf,
    pages: u64,
}

/// The numbers of pages are changed by one at a time.
static CHANGING: Mutex<()> = Mutex::new(());

impl HugePages {
    /// Sets aside as many as the limits allow. Blocks.
    pub fn reserve(resources: &LinuxResources) -> Result<Self, Error> {
        let mut reserved = Self::default();
        for limit in resources.hugepage_limits().iter().flatten() {
            let (size, bytes) = (limit.page_size(), u64::try_from(limit.limit()).unwrap_or(0));
            // Kubernetes names all sizes that the host has.
            if bytes > 0 {
                let kib = kib(size).ok_or_else(|| Error::Size(size.clone()))?;
                let file = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages");
                let pages = bytes.div_ceil(kib << 10);
                let one = Reserved { size: size.clone(), file: file.into(), pages: 0 };
                reserved.0.push(one.grow(pages)?);
            }
        }
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        for reserved in &self.0 {
            let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
            let left = reserved.now().map(|now| now.saturating_sub(reserved.pages));
            if let Err(error) = left.and_then(|left| fs::write(&reserved.file, left.to_string())) {
                log::warn!("{}: {error}", reserved.file.display());
            }
        }
    }
}

impl Reserved {
    fn now(&self) -> io::Result<u64> {
        fs::read_to_string(&self.file)?.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn grow(self, pages: u64) -> Result<Self, Error> {
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Error::Size(self.size.clone()),
            _ => Error::Kernel(self.size.clone(), error),
        };
        let before = self.now().map_err(failed)?;
        let wanted = before.saturating_add(pages);
        fs::write(&self.file, wanted.to_string()).map_err(failed)?;
        // Linux finds as many as it can, and says nothing.
        let found = self.now().map_err(failed)?;
        if found < wanted {
            fs::write(&self.file, before.to_string()).map_err(failed)?;
            return Err(Error::Memory { size: self.size, wanted, found });
        }
        Ok(Self { pages, ..self })
    }
}

/// A size as cgroups name it, such as 2MB, in KiB.
fn kib(size: &str) -> Option<u64> {
    let digits = size.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = size.split_at_checked(digits)?;
    let shift = match unit {
        "KB" => 0,
        "MB" => 10,
        "GB" => 20,
        _ => return None,
    };
    number.parse::<u64>().ok().filter(|number| (1..1 << 20).contains(number)).map(|number| number << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_cgroups() {
        assert_eq!([kib("2MB"), kib("64KB"), kib("1GB")], [Some(2048), Some(64), Some(1 << 20)]);
        for bad in ["", "MB", "2", "2M", "0MB", "-2MB", "2mb", "99999999999999GB", "2MB/..", "ä"] {
            assert_eq!(kib(bad), None, "{bad}");
        }
    }

    #[test]
    fn nothing_is_set_aside_for_a_limit_of_nothing() {
        let resources = r#"{"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}"#;
        assert!(HugePages::reserve(&serde_json::from_str(resources).unwrap()).unwrap().0.is_empty());
        let resources = resources.replace(": 0", ": 1");
        let error = HugePages::reserve(&serde_json::from_str(&resources).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Size(size) if size == "3MB"));
    }
}
