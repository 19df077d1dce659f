//! Transparent huge pages: the guest's kernel is to use them as the host's does (Linux, admin-guide/mm/transhuge.rst).
//! By itself it turns them off in a machine that begins with less than 512 MiB, whatever its parameters say and however
//! large it becomes; so the agent sets them again, by these parameters.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use katana_protocol::TRANSPARENT_HUGE_PAGES;

/// Where the host's settings are.
const HOST: &str = "/sys/kernel/mm/transparent_hugepage";

/// The guest kernel's parameters, or nothing on a host that has no such pages.
pub(crate) fn parameters() -> &'static str {
    // One look for the life of a shim: what a template's name stands for does not change in between.
    static PARAMETERS: OnceLock<String> = OnceLock::new();
    PARAMETERS.get_or_init(|| parameters_of(Path::new(HOST)))
}

fn parameters_of(directory: &Path) -> String {
    let parameters = TRANSPARENT_HUGE_PAGES.iter().filter_map(|(parameter, file)| {
        let choices = fs::read_to_string(directory.join(file)).ok()?;
        Some(format!("{parameter}={}", chosen(&choices)?))
    });
    parameters.collect::<Vec<_>>().join(" ")
}

/// Of a list such as `always [madvise] never`, what is in force.
fn chosen(choices: &str) -> Option<&str> {
    let chosen =
        choices.split_ascii_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))?;
    let is_word = |byte: u8| byte.is_ascii_lowercase() || b"_+".contains(&byte);
    (!chosen.is_empty() && chosen.bytes().all(is_word)).then_some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_stands_in_brackets() {
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen("always defer [defer+madvise] madvise never\n"), Some("defer+madvise"));
        assert_eq!(chosen("[within_size]"), Some("within_size"));
        for bad in ["", "always", "[]", "[a b]", "[x=y]", "[Never]"] {
            assert_eq!(chosen(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_host_without_such_pages_says_nothing() {
        assert_eq!(parameters_of(Path::new("/nowhere")), "");
    }

    #[test]
    fn the_hosts_choices_become_parameters() {
        let directory = std::env::temp_dir().join(format!("katana-thp-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        for (file, choices) in [
            ("enabled", "[always] madvise never"),
            ("defrag", "always defer defer+madvise [madvise] never"),
            ("shmem_enabled", "always within_size advise [never] deny force"),
        ] {
            fs::write(directory.join(file), choices).unwrap();
        }
        let parameters = parameters_of(&directory);
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(parameters, "transparent_hugepage=always agent.thp_defrag=madvise agent.thp_shmem=never");
    }
}
