//! Templates of machines: files from which the VMM restores machines instead of booting them. Where they are, for which
//! machine each of them is, and how one is put there so that nobody ever sees half of it.
//!
//! The directory has one file `NAME-VERSION` for each configuration in use. The name stands for the shape of the
//! machine and the paths of what it is made of, and for those who share it; the version for the contents of these, the
//! CPU and the host's kernel. A template of a name replaces those of other versions.
//!
//! The VMM that makes a template is one that tenants' containers run in afterwards, so it must not be able to change
//! what others start from. It has the file open for writing until it says that the template is complete; then the
//! kernel is asked whether anybody still has, be it by a mapping alone (`seal`).

pub mod clocksource;
mod huge_pages;
mod seal;

use std::arch::x86_64::{__cpuid_count, CpuidResult};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use katana_config::trusted::{self, Links};
use katana_config::{Config, TemplateScope};
use katana_protocol::vmm::{Machine, Template};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// NIC slots of a machine from a template. A pod that needs more boots.
pub const NET_SLOTS: u8 = 4;

/// Linux takes memory in sections of so many MiB.
const SECTION_MIB: u64 = 128;
/// How the file ends that is to become a template.
const PART: &str = ".part";
/// A template of another name that nobody has read for a week is in nobody's way any more, but takes memory.
const LONGEST_IDLE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory.
    #[error("\"{}\": {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else makes it at this moment.
    #[error("another process is making it")]
    Busy,
    /// Whoever made it could still change it.
    #[error("\"{}\": still open for writing, or mapped, after it was made", .0.display())]
    Writable(PathBuf),
}

type Result<T> = std::result::Result<T, Error>;

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// The machine of a configuration as it is in a template: one vCPU on line, no memory plugged, slots for what most
/// pods need.
pub fn machine(config: &Config) -> Machine {
    let hypervisor = &config.hypervisor;
    // Of two that say different things, the last one holds.
    let mut kernel_params = format!("{} {}", huge_pages::parameters(), hypervisor.kernel_params);
    if config.agent.enable_debug {
        kernel_params.push_str(" agent.log=debug");
    }
    let vcpus = hypervisor.default_maxvcpus.max(hypervisor.default_vcpus).max(1);
    let pluggable = hypervisor.default_maxmemory.saturating_sub(hypervisor.default_memory);
    Machine {
        vcpus: 1,
        max_vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
        memory_mib: u64::from(hypervisor.default_memory),
        pluggable_mib: u64::from(pluggable) / SECTION_MIB * SECTION_MIB,
        kernel_params: kernel_params.trim().to_owned(),
        net_slots: NET_SLOTS,
        disk_slots: u8::try_from(hypervisor.disk_slots).unwrap_or(u8::MAX),
        invariant_tsc: clocksource::is_tsc(),
        guest_cid: 0,
        template: Template::None,
        debug: hypervisor.enable_debug,
    }
}

/// The place of one machine's template.
pub struct Store {
    directory: PathBuf,
    name: String,
    version: String,
}

impl Store {
    /// The place for this configuration's machine, for the pods of a namespace where each has its own.
    ///
    /// # Errors
    /// When a file of which it is made is not there.
    pub fn of(config: &Config, namespace: &str) -> Result<Self> {
        let hypervisor = &config.hypervisor;
        let files = [&hypervisor.path, &hypervisor.kernel, &hypervisor.image];
        // Cannot fail: the shape is numbers and text.
        let shape = serde_json::to_vec(&machine(config)).unwrap_or_default();
        let (mut name, mut version) = (Sha256::new(), Sha256::new());
        name.update(&shape);
        for file in files {
            name.update([0]);
            name.update(file.as_os_str().as_encoded_bytes());
            let metadata = fs::metadata(file).map_err(at(file))?;
            // To hash the contents would take longer than to boot. Who changes a file changes one of these.
            for number in [metadata.dev(), metadata.ino(), metadata.len()] {
                version.update(number.to_le_bytes());
            }
            for time in [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()] {
                version.update(time.to_le_bytes());
            }
        }
        if config.factory.template_scope == TemplateScope::Namespace {
            name.update([1]);
            name.update(namespace);
        }
        version.update(env!("CARGO_PKG_VERSION"));
        add_host(&mut version);
        let directory = config.factory.template_path.clone();
        Ok(Self { directory, name: short(name), version: short(version) })
    }

    /// The template's file.
    pub fn path(&self) -> PathBuf {
        self.directory.join(format!("{}-{}", self.name, self.version))
    }

    /// The template, if there is one.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&self) -> Result<Option<Found>> {
        let path = self.path();
        // Whoever can write to it, or put another in its place, is in all machines that come from it.
        match trusted::open(&path, Links::Follow) {
            Ok(file) => Ok(Some(Found { file, path })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// An empty file to be made the template. Nobody else gets one meanwhile.
    ///
    /// # Errors
    /// [`Error::Busy`], or when the directory cannot be written to.
    pub fn begin(self) -> Result<Draft> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.directory);
        made.map_err(at(&self.directory))?;
        // Somebody else may have made it before.
        trusted::open(&self.directory, Links::Follow).map_err(at(&self.directory))?;
        let mut part = self.path().into_os_string();
        part.push(PART);
        let part = PathBuf::from(part);
        // Not for writing: that would be in the way of another's seal.
        let made = File::options().read(true).custom_flags(libc::O_CREAT).mode(0o600).open(&part);
        let made = made.map_err(at(&part))?;
        let lock = Flock::lock(made, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::errno::Errno::EWOULDBLOCK => Error::Busy,
            error => at(&part)(error.into()),
        })?;
        // Whoever had the lock before may have put the file in its place, or have taken it away.
        let file =
            File::options().read(true).write(true).open(&part).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::Busy,
                _ => at(&part)(error),
            })?;
        let ours = file.metadata().map_err(at(&part))?;
        if !lock.metadata().is_ok_and(|locked| (locked.dev(), locked.ino()) == (ours.dev(), ours.ino())) {
            return Err(Error::Busy);
        }
        file.set_len(0).map_err(at(&part))?;
        Ok(Draft { store: self, part, lock, file, done: false })
    }

    /// All templates of this directory, by their files.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn all(config: &Config) -> Result<Vec<PathBuf>> {
        let directory = &config.factory.template_path;
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(at(directory))?,
        };
        let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(at(directory)));
        let mut paths: Vec<_> = paths.collect::<Result<_>>()?;
        paths.retain(|path| path.is_file());
        paths.sort();
        Ok(paths)
    }
}

/// A template that is there.
pub struct Found {
    file: File,
    path: PathBuf,
}

impl Found {
    /// What the VMM restores.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes it away, unless another has taken its place.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove(&self) -> Result<()> {
        let ours = self.file.metadata().map_err(at(&self.path))?;
        match fs::metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                fs::remove_file(&self.path).map_err(at(&self.path))
            }
            _ => Ok(()),
        }
    }
}

/// A template in the making. Dropped before [`Draft::commit`] it leaves nothing behind.
pub struct Draft {
    store: Store,
    part: PathBuf,
    /// Read-only.
    lock: Flock<File>,
    file: File,
    done: bool,
}

impl Draft {
    /// The file, which the VMM fills.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts the complete file in its place. Whoever has filled it has to have closed it.
    ///
    /// # Errors
    /// When it has not, or the file system refuses.
    pub fn commit(mut self) -> Result<()> {
        let path = self.store.path();
        let Self { part, lock, file, done, .. } = &mut self;
        lock.sync_all().map_err(at(part))?;
        // Ours is for writing as well.
        *file = lock.try_clone().map_err(at(part))?;
        let sealed = seal::seal(lock).map_err(at(part))?;
        let sealed = sealed.ok_or_else(|| Error::Writable(part.clone()))?;
        fs::rename(&*part, &path).map_err(at(&path))?;
        *done = true;
        drop(sealed);
        self.remove_others(&path);
        Ok(())
    }

    /// Machines that come from other versions keep what they have of them.
    fn remove_others(&self, ours: &Path) {
        let Ok(entries) = fs::read_dir(&self.store.directory) else { return };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let template = name.to_str().map(|name| name.strip_suffix(PART).unwrap_or(name));
            let Some((name, _)) = template.and_then(parts) else { continue };
            let idle = || entry.metadata().is_ok_and(|metadata| is_idle(&metadata, SystemTime::now()));
            if path != ours && (name == self.store.name || idle()) && !is_being_made(&path) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Whether somebody makes a template in this file: the maker holds the lock of it until it is in its place.
fn is_being_made(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == PART.trim_start_matches('.'))
        && File::open(path).is_ok_and(|part| Flock::lock(part, FlockArg::LockExclusiveNonblock).is_err())
}

/// Name and version, if this is what a template's file is called.
fn parts(file: &str) -> Option<(&str, &str)> {
    let is_hash = |part: &str| part.len() == 16 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    file.split_once('-').filter(|(name, version)| is_hash(name) && is_hash(version))
}

/// Whether a template has been read neither for a week nor since it was made. The kernel notes that once a day at least
/// (relatime), and not at all on a mount with noatime.
fn is_idle(metadata: &fs::Metadata, now: SystemTime) -> bool {
    let last = metadata.atime().max(metadata.ctime());
    let last = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(last).unwrap_or_default());
    now.duration_since(last).is_ok_and(|idle| idle > LONGEST_IDLE)
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.part);
        }
    }
}

/// What of the host is in a machine's state: its CPU, as CPUID reports it, and its kernel's KVM.
fn add_host(hash: &mut Sha256) {
    const IDENTITY: [(u32, u32); 7] =
        [(0, 0), (1, 0), (7, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0007, 0), (0x8000_0008, 0)];
    for (leaf, subleaf) in IDENTITY {
        for register in identity(leaf, subleaf, __cpuid_count) {
            hash.update(register.to_le_bytes());
        }
    }
    for name in ["osrelease", "version"] {
        hash.update(fs::read(Path::new("/proc/sys/kernel").join(name)).unwrap_or_default());
    }
}

/// What all CPUs of the host have in common of this leaf.
fn identity(leaf: u32, subleaf: u32, cpuid: impl Fn(u32, u32) -> CpuidResult) -> [u32; 4] {
    // Intel CPUs answer for a leaf that they do not have with the last one that they have, which may be that of the
    // topology (Intel SDM volume 2, CPUID).
    if leaf > cpuid(leaf & 0x8000_0000, 0).eax {
        return [0; 4];
    }
    let CpuidResult { eax, mut ebx, ecx, edx } = cpuid(leaf, subleaf);
    if leaf == 1 {
        // The number of the CPU that this runs on.
        ebx &= 0x00ff_ffff;
    }
    [eax, ebx, ecx, edx]
}

fn short(hash: Sha256) -> String {
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
