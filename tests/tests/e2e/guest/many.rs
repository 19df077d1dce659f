//! Many small files, as package managers and version control make them.

use std::collections::BTreeSet;
use std::fs;

use super::Place;

const DIRECTORIES: usize = 10;
const FILES: usize = 1000;
/// One file in so many is read again.
const READ: usize = 10;

#[test]
#[ignore = "runs inside a container"]
fn ten_thousand_files_are_written_listed_read_and_removed() {
    let place = Place::new("many");
    let path = |directory: usize, file: usize| place.at(&format!("{directory}/file-{file:04}"));
    for directory in 0..DIRECTORIES {
        fs::create_dir(place.at(&directory.to_string())).expect("mkdir");
        for file in 0..FILES {
            fs::write(path(directory, file), format!("{directory} {file}")).expect("write");
        }
    }
    for directory in 0..DIRECTORIES {
        let entries = fs::read_dir(place.at(&directory.to_string())).expect("list");
        let names: BTreeSet<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
        assert_eq!(names.len(), FILES);
        for file in (0..FILES).step_by(READ) {
            assert_eq!(
                fs::read_to_string(path(directory, file)).expect("read"),
                format!("{directory} {file}")
            );
        }
    }
    // Removal while listing, as rm -r does it, by the directory's end.
    fs::remove_dir_all(place.at("0")).expect("remove");
    assert_eq!(fs::read_dir(&place.0).expect("list").count(), DIRECTORIES - 1);
}
