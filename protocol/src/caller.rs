//! What the agent says after the stream key on a connection that is forwarded to a socket of the host: the socket's
//! secret, by which it is one to this socket, and who has connected there. The shim answers with one byte, 0 or an
//! error number.
//!
//! The shim connects as this user, so that what the host's kernel lets pass, and reports to the server (SO_PEERCRED),
//! is what it would be without a machine in between.

/// Bytes of a socket's secret.
pub const SECRET: usize = 16;
/// Bytes before the groups: secret, user, group, how many more groups; numbers with the highest byte first.
pub const HEAD: usize = SECRET + 4 + 4 + 2;
/// A caller in more groups than this is not let through. Linux allows 65536, but 64 KiB of groups are no matter of
/// sockets.
pub const MOST_GROUPS: usize = 1024;

/// Credentials of a process that connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

/// The part of a message that has a fixed length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What claims to be the socket's secret.
    pub secret: [u8; SECRET],
    uid: u32,
    gid: u32,
    groups: usize,
}

impl Caller {
    /// The whole message; `None` with too many groups.
    pub fn message(&self, secret: &[u8; SECRET]) -> Option<Vec<u8>> {
        let count =
            u16::try_from(self.groups.len()).ok().filter(|count| usize::from(*count) <= MOST_GROUPS)?;
        let mut message = secret.to_vec();
        message.extend([self.uid, self.gid].iter().flat_map(|id| id.to_be_bytes()));
        message.extend(count.to_be_bytes());
        message.extend(self.groups.iter().flat_map(|group| group.to_be_bytes()));
        Some(message)
    }
}

impl Head {
    /// Reads it; `None` with too many groups.
    pub fn parse(bytes: &[u8; HEAD]) -> Option<Self> {
        let (secret, rest) = bytes.split_first_chunk()?;
        let (uid, rest) = rest.split_first_chunk()?;
        let (gid, rest) = rest.split_first_chunk()?;
        let groups = usize::from(u16::from_be_bytes(rest.try_into().ok()?));
        let (uid, gid) = (u32::from_be_bytes(*uid), u32::from_be_bytes(*gid));
        (groups <= MOST_GROUPS).then_some(Self { secret: *secret, uid, gid, groups })
    }

    /// How many bytes follow.
    pub fn rest(&self) -> usize {
        self.groups * size_of::<u32>()
    }

    /// The caller, when those have come.
    pub fn caller(&self, rest: &[u8]) -> Caller {
        let (groups, _) = rest.as_chunks();
        let groups = groups.iter().map(|group| u32::from_be_bytes(*group)).collect();
        Caller { uid: self.uid, gid: self.gid, groups }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let secret = *b"0123456789abcdef";
        for groups in [vec![], vec![0, 1, u32::MAX], (0..1024).collect()] {
            let caller = Caller { uid: 1000, gid: 0xdead_beef, groups };
            let message = caller.message(&secret).unwrap();
            let (head, rest) = message.split_first_chunk().unwrap();
            let head = Head::parse(head).unwrap();
            assert_eq!((head.secret, head.rest()), (secret, rest.len()));
            assert_eq!(head.caller(rest), caller);
        }
    }

    #[test]
    fn too_many_groups_are_refused_by_both() {
        let caller = Caller { uid: 0, gid: 0, groups: vec![0; MOST_GROUPS + 1] };
        assert_eq!(caller.message(&[0; SECRET]), None);
        assert_eq!(Head::parse(&[0xff; HEAD]), None);
    }

    #[test]
    fn fuzz_caller() {
        katana_fuzz::fuzz("caller", |input| {
            let mut head = [0; HEAD];
            let bytes = input.bytes(HEAD);
            head[..bytes.len()].copy_from_slice(bytes);
            let Some(parsed) = Head::parse(&head) else { return };
            let mut rest = input.rest().to_vec();
            rest.resize(parsed.rest(), 0);
            let caller = parsed.caller(&rest);
            assert_eq!(caller.message(&parsed.secret).unwrap(), [&head[..], &rest].concat());
        });
    }
}
