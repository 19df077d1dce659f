//! The options that a client gives with a runtime's name.

use std::path::PathBuf;

use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;

use crate::error::{Error, Result};

/// ConfigPath of `runtimeoptions.v1.Options`, with which `ctr run --runtime-config-path` and the CRI plugin
/// name a configuration. Options of other types are those of other runtimes.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(options) = options else { return Ok(None) };
    if !options.type_url.ends_with("runtimeoptions.v1.Options") {
        return Ok(None);
    }
    let parsed = string_field(&options.value, 2);
    let path = parsed.map_err(|e| Error::InvalidArgument(format!("runtime options: {e}")))?;
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// A string member of a message of which nothing else is of interest.
fn string_field(message: &[u8], field: u32) -> protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // protobuf encoding: field number above three bits of wire type, 2 for what has a length.
        match (tag >> 3, tag & 7) {
            (number, 2) if number == field => found = Some(input.read_string()?),
            (_, 0) => drop(input.read_raw_varint64()?),
            (_, 1) => drop(input.read_fixed64()?),
            (_, 2) => drop(input.read_bytes()?),
            (_, 5) => drop(input.read_fixed32()?),
            _ => return Err(protobuf::Error::from(std::io::Error::from(std::io::ErrorKind::InvalidData))),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(kind: &str, value: &[u8]) -> Option<Any> {
        Some(Any { type_url: kind.into(), value: value.to_vec(), ..Default::default() })
    }

    #[test]
    fn the_configuration_of_a_client_is_found() {
        let value = b"\x0a\x01x\x12\x06/a.tom\x1a\x00\x20\x01";
        for kind in ["runtimeoptions.v1.Options", "type.googleapis.com/runtimeoptions.v1.Options"] {
            assert_eq!(config_path(options(kind, value).as_ref()).unwrap(), Some(PathBuf::from("/a.tom")));
        }
        assert_eq!(config_path(options("containerd.runc.v1.Options", value).as_ref()).unwrap(), None);
        assert_eq!(config_path(options("runtimeoptions.v1.Options", b"").as_ref()).unwrap(), None);
        assert_eq!(config_path(None).unwrap(), None);
        for hostile in [&b"\x12\xff"[..], b"\x12\xff\xff\xff\xff\x0f", b"\x12\x02\xff\xfe", b"\x17", b"\xff"]
        {
            assert!(
                config_path(options("runtimeoptions.v1.Options", hostile).as_ref()).is_err(),
                "{hostile:?}"
            );
        }
    }
}
