//! What this is a version of.

/// The version of Katana.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The version of the OCI runtime specification that shim and agent are written to.
pub(crate) const OCI: &str = "1.2.0";

/// The commit that it was built from, if the build said so.
pub(crate) fn commit() -> &'static str {
    option_env!("KATANA_COMMIT").filter(|commit| !commit.is_empty()).unwrap_or("unknown")
}

/// What `--version` prints, in the form of Kata Containers' tool, which scripts take apart.
pub(crate) fn text() -> String {
    format!("kata-runtime  : {VERSION}\n   commit   : {}\n   OCI specs: {OCI}", commit())
}

#[cfg(test)]
mod tests {
    #[test]
    fn text_has_the_form_of_kata() {
        let text = super::text();
        let labels: Vec<_> = text.lines().map(|line| &line[..14]).collect();
        assert_eq!(labels, ["kata-runtime  ", "   commit   : ", "   OCI specs: "]);
    }
}
