use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use tar::{Builder, EntryType, Header};

use super::*;

/// A directory of the test's own.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("katana-archive-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(path.join("to")).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn packed(source: &Path, follow: bool) -> (Vec<u8>, Vec<String>) {
    let (mut stream, mut left_out) = (Vec::new(), Vec::new());
    pack(source, follow, &mut stream, &mut |path, why| {
        left_out.push(format!("{} {why}", path.file_name().unwrap().display()));
    })
    .unwrap();
    (stream, left_out)
}

fn copy(source: &Path, destination: &Path) -> Result<()> {
    unpack(&*packed(source, false).0, destination, Manner::default())
}

/// A stream with one entry.
fn stream(kind: EntryType, name: &[u8], link: &[u8], contents: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(contents.len() as u64);
    header.set_mode(0o6755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(7);
    // Not by the library's functions, which refuse what is to be tried.
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name);
    old.linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    let mut stream = Builder::new(Vec::new());
    stream.append(&header, contents).unwrap();
    let mut stream = stream.into_inner().unwrap();
    stream.truncate(stream.len() - 1024);
    stream
}

fn file(name: &str) -> Vec<u8> {
    stream(EntryType::Regular, name.as_bytes(), b"", b"hostile")
}

fn refusal(stream: &[u8], destination: &Path) -> String {
    unpack(stream, destination, Manner::default()).unwrap_err().to_string()
}

#[test]
fn a_directory_comes_out_as_it_went_in() {
    let scratch = Scratch::new();
    let source = scratch.path("from");
    let deep = (0..40).fold(source.join("deep"), |path, _| path.join("a-rather-long-name"));
    fs::create_dir_all(&deep).unwrap();
    let large: Vec<u8> = (0..3 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(deep.join("large"), &large).unwrap();
    fs::write(source.join("run"), "#!").unwrap();
    fs::set_permissions(source.join("run"), fs::Permissions::from_mode(0o4750)).unwrap();
    symlink("/etc/passwd", source.join("link")).unwrap();
    nix::unistd::mkfifo(&source.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let old = fs::File::options().write(true).open(source.join("run")).unwrap();
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    old.set_modified(then).unwrap();
    fs::File::open(source.join("deep")).unwrap().set_modified(then).unwrap();

    let (stream, left_out) = packed(&source, false);
    assert_eq!(left_out, ["fifo a device or FIFO is not copied"]);
    unpack(&*stream, &scratch.path("to"), Manner::default()).unwrap();
    let arrived = scratch.path("to/from");
    let same = deep.strip_prefix(&source).unwrap();
    assert!(fs::read(arrived.join(same).join("large")).unwrap() == large);
    let run = fs::metadata(arrived.join("run")).unwrap();
    assert_eq!((run.mode() & 0o7777, run.mtime()), (0o750, 1_000_000_000));
    assert_eq!(fs::metadata(arrived.join("deep")).unwrap().mtime(), 1_000_000_000);
    assert_eq!(fs::read_link(arrived.join("link")).unwrap(), Path::new("/etc/passwd"));

    // A second time over the first, with what is not kept otherwise.
    unpack(&*stream, &scratch.path("to"), Manner { keeps: true, ..Manner::default() }).unwrap();
    assert_eq!(fs::metadata(arrived.join("run")).unwrap().mode() & 0o7777, 0o4750);
}

/// The table of `docker cp`'s documentation.
#[test]
fn the_destination_is_chosen_as_by_docker() {
    let scratch = Scratch::new();
    let (file, directory) = (scratch.path("file"), scratch.path("directory"));
    fs::write(&file, "text").unwrap();
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("inner"), "inner").unwrap();

    copy(&file, &scratch.path("to/new")).unwrap();
    copy(&file, &scratch.path("to/")).unwrap();
    assert_eq!((scratch.text("to/new"), scratch.text("to/file")), ("text".into(), "text".into()));
    fs::write(scratch.path("to/new"), "longer than before").unwrap();
    copy(&file, &scratch.path("to/new")).unwrap();
    assert_eq!(scratch.text("to/new"), "text");
    let error = copy(&file, &scratch.path("to/none/")).unwrap_err().to_string();
    assert!(error.ends_with("to/none/: there is no such directory"), "{error}");
    let error = copy(&file, &scratch.path("to/none/file")).unwrap_err().to_string();
    assert!(error.ends_with("to/none: No such file or directory"), "{error}");

    copy(&directory, &scratch.path("to/copy")).unwrap();
    copy(&directory, &scratch.path("to")).unwrap();
    copy(&directory.join("."), &scratch.path("to")).unwrap();
    copy(&directory.join("."), &scratch.path("to/dot")).unwrap();
    for inner in ["to/copy/inner", "to/directory/inner", "to/inner", "to/dot/inner"] {
        assert_eq!(scratch.text(inner), "inner", "{inner}");
    }
    let error = copy(&directory, &scratch.path("to/new")).unwrap_err().to_string();
    assert!(error.ends_with("to/new: a directory cannot take the place of a file"), "{error}");
    fs::create_dir(scratch.path("to/file2")).unwrap();
    fs::rename(&file, scratch.path("file2")).unwrap();
    let error = copy(&scratch.path("file2"), &scratch.path("to")).unwrap_err().to_string();
    assert!(error.ends_with("to/file2: there is a directory"), "{error}");

    // A link as the destination leads to what is meant; as the source it is itself, unless it is followed.
    symlink("new", scratch.path("to/link")).unwrap();
    fs::write(scratch.path("other"), "through").unwrap();
    copy(&scratch.path("other"), &scratch.path("to/link")).unwrap();
    assert_eq!(scratch.text("to/new"), "through");
    copy(&scratch.path("to/link"), &scratch.path("to/link2")).unwrap();
    assert_eq!(fs::read_link(scratch.path("to/link2")).unwrap(), Path::new("new"));
    unpack(&*packed(&scratch.path("to/link"), true).0, &scratch.path("to/link3"), Manner::default()).unwrap();
    assert!(fs::symlink_metadata(scratch.path("to/link3")).unwrap().is_file());
}

#[test]
fn an_archive_keeps_its_names() {
    let scratch = Scratch::new();
    let archive = Manner { archive: true, keeps: false };
    let mut both = stream(EntryType::Regular, b"./a/b/one", b"", b"1");
    both.extend(stream(EntryType::Link, b"two", b"a/b/one", b""));
    unpack(&*both, &scratch.path("to"), archive).unwrap();
    assert_eq!(
        fs::metadata(scratch.path("to/two")).unwrap().ino(),
        fs::metadata(scratch.path("to/a/b/one")).unwrap().ino()
    );
    let error = unpack(&*both, &scratch.path("none"), archive).unwrap_err().to_string();
    assert!(error.ends_with("none: an archive is unpacked into a directory that is there"), "{error}");
    assert_eq!(refusal(b"", &scratch.path("to")), "tar stream: it is empty");
    assert!(refusal(&[7; 700], &scratch.path("to")).starts_with("tar stream: "));
    let whole = file("x");
    assert!(refusal(&whole[..515], &scratch.path("to")).starts_with("tar stream: "), "it breaks off");
}

#[test]
fn names_lead_down_only() {
    let scratch = Scratch::new();
    for name in ["/etc/evil", "../evil", "a/../../evil", "a/..", ".."] {
        let text = refusal(&file(name), &scratch.path("to"));
        assert_eq!(text, format!("tar stream: {name:?} is no name below the destination"));
    }
    // By an extended header, which the short name hides.
    for kind in [EntryType::GNULongName, EntryType::XHeader] {
        let long = if kind == EntryType::XHeader { b"16 path=../evil\n".as_slice() } else { b"../evil\0" };
        let mut both = stream(kind, b"header", b"", long);
        both.extend(file("harmless"));
        assert!(refusal(&both, &scratch.path("to")).contains("\"../evil\" is no name"), "{kind:?}");
    }
    let link = stream(EntryType::Link, b"x", b"../other", b"");
    assert!(refusal(&link, &scratch.path("to")).contains("\"../other\" is no name"));
    let endless = stream(EntryType::GNULongName, b"header", b"", &vec![b'a'; 70_000]);
    assert_eq!(refusal(&endless, &scratch.path("to")), "tar stream: an extended header of 70000 bytes");
    let long = stream(EntryType::GNULongName, b"header", b"", &vec![b'a'; 5000]);
    assert!(refusal(&[long, file("x")].concat(), &scratch.path("to")).contains("is no name"));
    assert!(!scratch.path("evil").exists());
    assert_eq!(fs::read_dir(scratch.path("to")).unwrap().count(), 0);
}

#[test]
fn nothing_is_written_through_a_link() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("outside")).unwrap();
    fs::write(scratch.path("outside/file"), "mine").unwrap();
    for (link, name) in [("../outside", "to/l/file"), ("../outside", "to/l/new/file")] {
        let mut both = stream(EntryType::Symlink, b"to/l", link.as_bytes(), b"");
        both.extend(file(name));
        let text = refusal(&both, &scratch.path("."));
        assert!(text.ends_with("there is a symbolic link, through which nothing is written"), "{text}");
    }
    let mut directory = stream(EntryType::Symlink, b"to/l", b"../outside", b"");
    directory.extend(stream(EntryType::Directory, b"to/l", b"", b""));
    let text = refusal(&directory, &scratch.path("."));
    assert!(text.ends_with("to/l: there is something else than a directory"), "{text}");
    // A file takes the place of the link, or of the other name of a file, and changes neither's file.
    let mut both = stream(EntryType::Symlink, b"to/l", b"../outside/file", b"");
    both.extend(file("to/l"));
    unpack(&*both, &scratch.path("."), Manner::default()).unwrap();
    let mut both = stream(EntryType::Link, b"to/l", b"outside/file", b"");
    both.extend(file("to/l"));
    unpack(&*both, &scratch.path("."), Manner::default()).unwrap();
    assert_eq!((scratch.text("outside/file"), scratch.text("to/l")), ("mine".into(), "hostile".into()));
}

#[test]
fn devices_and_set_id_bits_do_not_come() {
    let scratch = Scratch::new();
    for (kind, what) in [
        (EntryType::Char, "a device"),
        (EntryType::Block, "a device"),
        (EntryType::Fifo, "a FIFO"),
        (EntryType::GNUSparse, "a sparse file"),
        (EntryType::new(b'Z'), "of an unknown kind"),
    ] {
        let text = refusal(&stream(kind, b"x", b"", b""), &scratch.path("to"));
        assert_eq!(text, format!("tar stream: \"x\" is {what}, which is not copied"));
    }
    unpack(&*file("plain"), &scratch.path("to"), Manner::default()).unwrap();
    assert_eq!(fs::metadata(scratch.path("to/plain")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn a_file_that_changes_its_length_breaks_nothing() {
    struct Cutting<'a>(&'a mut Vec<u8>, PathBuf);
    impl Write for Cutting<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Once the header is out.
            let _ = fs::write(&self.1, "short");
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let scratch = Scratch::new();
    let path = scratch.path("file");
    fs::write(&path, vec![b'x'; 100_000]).unwrap();
    let mut stream = Vec::new();
    pack(&path, false, Cutting(&mut stream, path.clone()), &mut |_, _| ()).unwrap();
    unpack(&*stream, &scratch.path("to"), Manner::default()).unwrap();
    let arrived = fs::read(scratch.path("to/file")).unwrap();
    assert_eq!((arrived.len(), &arrived[..6]), (100_000, b"short\0".as_slice()));
}

#[test]
fn fuzz_archive() {
    let scratch = Scratch::new();
    fs::write(scratch.path("outside"), "mine").unwrap();
    let top: Vec<_> = fs::read_dir(&scratch.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    katana_fuzz::fuzz("archive", |input| {
        let mut entries = Vec::new();
        let bytes = input.rest();
        // Headers with good sums, or nothing would be looked at.
        for block in bytes.chunks(100) {
            let (kind, rest) = (block[0], &block[1..]);
            let (name, link) = rest.split_at(rest.len() / 2);
            let contents = if kind % 4 == 0 { bytes } else { b"" };
            entries.extend(stream(EntryType::new(b"0125xLKg"[usize::from(kind % 8)]), name, link, contents));
        }
        let _ = unpack(&*entries, &scratch.path("to"), Manner::default());
        let _ = unpack(bytes, &scratch.path("to"), Manner { archive: true, keeps: true });
        let now: Vec<_> = fs::read_dir(&scratch.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(now == top && scratch.text("outside") == "mine");
    });
}
