//! The installation: that the configured files are there and are what they should be, and that the host lets
//! the VMM lock itself in.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use katana_config::Config;
use katana_config::trusted::{self, Links};
use nix::sched::{CloneFlags, unshare};

/// ELF, System V ABI, "ELF Identification": magic, 64 bits, little-endian.
const ELF: Magic = Magic { offset: 0, bytes: b"\x7FELF\x02\x01", what: "an uncompressed 64-bit ELF kernel" };
/// The superblock of erofs, Linux fs/erofs/erofs_fs.h.
const EROFS: Magic = Magic { offset: 1024, bytes: &0xE0F5_E1E2_u32.to_le_bytes(), what: "an erofs image" };

/// Why containers cannot be created with what is installed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{key} in [hypervisor.katana]: {}: {source}", path.display())]
    File { key: &'static str, path: PathBuf, source: io::Error },
    #[error("{key} in [hypervisor.katana]: {} is not {what}", path.display())]
    Kind { key: &'static str, path: PathBuf, what: &'static str },
    #[error("template_path in [factory]: {}: {source}", path.display())]
    Templates { path: PathBuf, source: io::Error },
    #[error(
        "the VMM cannot lock itself in: no new user, mount, network, IPC, UTS and pid namespaces: {0}: see /proc/sys/user/max_*_namespaces"
    )]
    Namespaces(io::Error),
}

struct Magic {
    offset: u64,
    bytes: &'static [u8],
    what: &'static str,
}

/// Checks it: what was looked at, and what was found.
pub(crate) fn check(config: &Config) -> [(&'static str, Result<String, Error>); 5] {
    let hypervisor = &config.hypervisor;
    let found = |path: &Path, result: Result<(), Error>| result.map(|()| path.display().to_string());
    let (path, kernel, image) = (&hypervisor.path, &hypervisor.kernel, &hypervisor.image);
    let templates = &config.factory.template_path;
    let namespaces = check_namespaces().map_err(Error::Namespaces);
    [
        ("VMM", found(path, check_program("path", path))),
        ("kernel", found(kernel, check_magic("kernel", kernel, &ELF))),
        ("image", found(image, check_magic("image", image, &EROFS))),
        ("directory of templates", found(templates, check_templates(templates))),
        ("namespaces of the VMM's jail", namespaces.map(|()| "available".to_owned())),
    ]
}

fn check_program(key: &'static str, path: &Path) -> Result<(), Error> {
    let metadata = trusted::open(path, Links::Follow).and_then(|file| file.metadata());
    let metadata = metadata.map_err(|source| Error::File { key, path: path.to_owned(), source })?;
    if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(Error::Kind { key, path: path.to_owned(), what: "an executable file" })
}

/// It is made by the first start, if it is not there.
fn check_templates(path: &Path) -> Result<(), Error> {
    match trusted::open(path, Links::Follow) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::Templates { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn check_magic(key: &'static str, path: &Path, magic: &Magic) -> Result<(), Error> {
    match has_magic(path, magic) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Kind { key, path: path.to_owned(), what: magic.what }),
        Err(source) => Err(Error::File { key, path: path.to_owned(), source }),
    }
}

fn has_magic(path: &Path, magic: &Magic) -> io::Result<bool> {
    let mut file = trusted::open(path, Links::Follow)?;
    file.seek(SeekFrom::Start(magic.offset))?;
    let mut start = Vec::new();
    file.take(magic.bytes.len() as u64).read_to_end(&mut start)?;
    Ok(start == magic.bytes)
}

/// Makes, in a child, the namespaces of the jail.
fn check_namespaces() -> io::Result<()> {
    let flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWPID;
    let mut child = Command::new("/proc/self/exe");
    child.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec the child makes one system call and allocates nothing.
    unsafe { child.pre_exec(move || unshare(flags).map_err(io::Error::from)) };
    // The child's failure before exec, with its error number, is that of `spawn`.
    child.spawn()?.wait()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(path: &str) -> Config {
        let text = format!(
            "[hypervisor.katana]\npath = \"{0}/vmm\"\nkernel = \"{0}/kernel\"\nimage = \"{0}/image\"\n",
            path
        );
        let file = Path::new(path).join("configuration.toml");
        std::fs::write(&file, text).unwrap();
        katana_config::load(Some(&file)).unwrap()
    }

    #[test]
    fn each_file_is_looked_at() {
        let folder = std::env::temp_dir().join(format!("katana-check-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.display().to_string();
        let config = configured(&path);
        let error = || {
            let mut failures = check(&config).into_iter().filter_map(|(_, result)| result.err());
            failures.next().unwrap().to_string()
        };

        let missing = "No such file or directory (os error 2)";
        assert_eq!(error(), format!("path in [hypervisor.katana]: {path}/vmm: {missing}"));
        std::fs::copy("/bin/true", folder.join("vmm")).unwrap();
        assert_eq!(error(), format!("kernel in [hypervisor.katana]: {path}/kernel: {missing}"));
        std::fs::write(folder.join("kernel"), b"MZ").unwrap();
        let what = "is not an uncompressed 64-bit ELF kernel";
        assert_eq!(error(), format!("kernel in [hypervisor.katana]: {path}/kernel {what}"));
        std::fs::copy("/bin/true", folder.join("kernel")).unwrap();
        std::fs::write(folder.join("image"), vec![0; 1026]).unwrap();
        assert_eq!(error(), format!("image in [hypervisor.katana]: {path}/image is not an erofs image"));
        for (file, key) in [("vmm", "path"), ("kernel", "kernel")] {
            let mode =
                |mode| std::fs::set_permissions(folder.join(file), PermissionsExt::from_mode(mode)).unwrap();
            mode(0o757);
            let why = format!("\"{path}/{file}\" can be written to by others than root (mode 0757)");
            assert_eq!(error(), format!("{key} in [hypervisor.katana]: {path}/{file}: {why}"));
            mode(0o755);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
