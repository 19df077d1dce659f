use super::*;
use std::os::unix::fs::FileExt;

/// An Intel CPU without XSAVE, whose last leaf is that of the topology, as processor `number` reports it.
fn lynnfield(number: u32) -> impl Fn(u32, u32) -> CpuidResult {
    move |leaf, _| match leaf {
        0 => CpuidResult { eax: 0xb, ebx: 1, ecx: 2, edx: 3 },
        1 => CpuidResult { eax: 0x106e5, ebx: number << 24 | 0x0010_0800, ecx: 5, edx: 6 },
        7 => CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 },
        0x8000_0000 => CpuidResult { eax: 0x8000_0008, ebx: 0, ecx: 0, edx: 0 },
        _ => CpuidResult { eax: 1, ebx: 2, ecx: 0x100, edx: number },
    }
}

#[test]
fn all_that_count_processors_can_count_as_many() {
    let fragment = include_str!("../../guest-kernel/fragment.config");
    let of_kernel = fragment.lines().find_map(|line| line.strip_prefix("CONFIG_NR_CPUS="));
    let of_vmm = katana_protocol::vmm::MOST_VCPUS;
    assert_eq!((of_kernel, katana_config::MOST_VCPUS), (Some(&*of_vmm.to_string()), of_vmm.into()));
}

#[test]
fn all_processors_of_a_host_are_one() {
    for leaf in [0, 1, 7, 0xd] {
        assert_eq!(identity(leaf, 1, lynnfield(0)), identity(leaf, 1, lynnfield(3)), "{leaf:#x}");
    }
    assert_eq!(identity(1, 0, lynnfield(3)), [0x106e5, 0x0010_0800, 5, 6]);
    assert_eq!(identity(0xd, 1, lynnfield(3)), [0; 4]);
}

fn store(directory: &Path) -> Store {
    Store {
        directory: directory.to_owned(),
        name: "0123456789abcdef".into(),
        version: "fedcba9876543210".into(),
    }
}

fn directory(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("katana-template-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    directory
}

#[test]
fn what_nobody_can_change_any_more_takes_its_place() {
    let directory = directory("commit");
    let draft = store(&directory).begin().unwrap();
    draft.file().write_all_at(b"a template", 0).unwrap();
    draft.commit().unwrap();
    let files: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files, [store(&directory).path()]);
    assert_eq!(fs::read(&files[0]).unwrap(), b"a template");
    assert_eq!(fs::metadata(&files[0]).unwrap().mtime(), katana_protocol::vmm::SEALED);
    // The next version takes its place; so it is for writing again.
    let next = Store { version: "0".repeat(16), ..store(&directory) };
    next.begin().unwrap().commit().unwrap();
    assert!(!files[0].exists());
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn what_its_maker_can_still_change_does_not() {
    let directory = directory("writable");
    let map = |file: &File, access| {
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                access,
                libc::MAP_SHARED,
                std::os::fd::AsRawFd::as_raw_fd(file),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        at
    };
    // SAFETY: the mappings below are used by nobody else.
    let unmap = |at| assert_eq!(unsafe { libc::munmap(at, 4096) }, 0);
    let refused = |draft: Draft| {
        let error = draft.commit().unwrap_err();
        assert!(matches!(error, Error::Writable(_)), "{error}");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    };
    let begin = || {
        let draft = store(&directory).begin().unwrap();
        draft.file().set_len(4096).unwrap();
        draft
    };

    let draft = begin();
    let copy = draft.file().try_clone().unwrap();
    refused(draft);
    drop(copy);

    // The descriptor is gone; a write would leave the time of modification what it is.
    for access in [libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ, libc::PROT_NONE] {
        let draft = begin();
        let at = map(draft.file(), access);
        refused(draft);
        unmap(at);
    }

    // Who can only read does not matter.
    let draft = begin();
    let reader = File::open(&draft.part).unwrap();
    let at = map(&reader, libc::PROT_READ);
    draft.commit().unwrap();
    unmap(at);
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn only_one_makes_it() {
    let directory = directory("busy");
    let draft = store(&directory).begin().unwrap();
    assert!(matches!(store(&directory).begin(), Err(Error::Busy)));
    // Who was turned away has not become a writer, nor emptied the file.
    draft.file().write_all_at(b"one", 0).unwrap();
    assert!(matches!(store(&directory).begin(), Err(Error::Busy)));
    draft.commit().unwrap();
    assert_eq!(fs::read(store(&directory).path()).unwrap(), b"one");
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn old_ones_go_and_strangers_stay() {
    let directory = directory("others");
    fs::create_dir(&directory).unwrap();
    let name = |name: &str| directory.join(name);
    let hash = |digit: &str| digit.repeat(16);
    let other = name(&format!("{}-{}", hash("a"), hash("b")));
    let stranger = name("0123456789abcdef-notes");
    fs::write(&other, "another configuration's, just made").unwrap();
    fs::write(&stranger, "").unwrap();
    // Of an older version: a whole one, and one whose maker has died.
    let old = name(&format!("{}-{}", store(&directory).name, hash("c")));
    let half = name(&format!("{}-{}{PART}", store(&directory).name, hash("d")));
    [&old, &half].iter().for_each(|file| fs::write(file, "").unwrap());
    store(&directory).begin().unwrap().commit().unwrap();
    assert!(other.exists() && stranger.exists());
    assert!(!old.exists() && !half.exists());
    let metadata = fs::metadata(&other).unwrap();
    let in_days = |days: u64| SystemTime::now() + Duration::from_secs(days * 24 * 3600);
    assert!(!is_idle(&metadata, in_days(6)) && is_idle(&metadata, in_days(8)));
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn namespaces_have_their_own_where_they_are_to() {
    let mut config = Config {
        without_meaning: Vec::new(),
        path: PathBuf::new(),
        hypervisor: Default::default(),
        agent: Default::default(),
        factory: Default::default(),
        runtime: Default::default(),
    };
    let this = std::env::current_exe().unwrap();
    let hypervisor = &mut config.hypervisor;
    (hypervisor.path, hypervisor.kernel, hypervisor.image) = (this.clone(), this.clone(), this);
    let path = |config: &Config, namespace| Store::of(config, namespace).unwrap().path();
    assert_eq!(path(&config, "a"), path(&config, "b"));
    let together = path(&config, "a");
    config.factory.template_scope = TemplateScope::Namespace;
    assert_eq!(path(&config, "a"), path(&config, "a"));
    assert!(path(&config, "a") != path(&config, "b") && path(&config, "a") != together);
}
