//! Networks of the host, for containers to be connected to.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::command::Command;

/// Runs `ip` with these words, which are separated by white space.
///
/// # Panics
/// When it fails.
#[track_caller]
pub fn ip(words: &str) {
    let words: Vec<&str> = std::iter::once("ip").chain(words.split_whitespace()).collect();
    Command::new(&words).output().ok();
}

fn quietly(words: &[&str]) {
    // A test that fails must not hide its reason behind a second panic.
    let _ = std::process::Command::new("ip").args(words).output();
}

fn number() -> u8 {
    static NUMBER: AtomicU8 = AtomicU8::new(1);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// A bridge with the host's addresses 10.88.N.1/24 and fd88:N::1/64. It is gone when this is dropped.
pub struct Bridge {
    name: String,
    number: u8,
    mtu: u32,
}

impl Bridge {
    /// Makes one.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn new(mtu: u32) -> Self {
        let number = number();
        let bridge = Self { name: format!("e2e-br{number}"), number, mtu };
        let name = &bridge.name;
        ip(&format!("link add {name} type bridge"));
        ip(&format!("link set {name} mtu {mtu} up"));
        let [v4, v6] = bridge.addresses(1);
        ip(&format!("address add {v4}/24 dev {name}"));
        ip(&format!("address add {v6}/64 dev {name} nodad"));
        bridge
    }

    /// The addresses of a host on it, IPv4 and IPv6.
    pub fn addresses(&self, host: u8) -> [String; 2] {
        let number = self.number;
        [format!("10.88.{number}.{host}"), format!("fd88:{number}::{host}")]
    }

    /// Makes a pair of interfaces: one on the bridge, the other with the addresses of `host` in a namespace, which `ip`
    /// knows by its name or by a process in it.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn connect(&self, namespace: &str, interface: &str, host: u8) {
        for command in self.commands(namespace, &format!("ip -n {namespace}"), interface, host) {
            Command::new(&command.split_whitespace().collect::<Vec<_>>()).output().ok();
        }
    }

    /// The commands of [`Bridge::connect`], for scripts. `inside` is `ip` in the namespace.
    pub fn commands(&self, namespace: &str, inside: &str, interface: &str, host: u8) -> Vec<String> {
        let (bridge, mtu, [v4, v6]) = (&self.name, self.mtu, self.addresses(host));
        let peer = format!("e2e-{}-{host}", self.number);
        vec![
            format!(
                "ip link add {peer} mtu {mtu} type veth peer name {interface} mtu {mtu} netns {namespace}"
            ),
            format!("ip link set {peer} master {bridge} up"),
            format!("{inside} address add {v4}/24 dev {interface}"),
            format!("{inside} address add {v6}/64 dev {interface} nodad"),
            format!("{inside} link set {interface} up"),
        ]
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        quietly(&["link", "delete", &self.name]);
    }
}

/// A network namespace below /run/netns. It is gone when this is dropped.
pub struct Namespace(String);

impl Namespace {
    /// Makes one with nothing but `lo`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[allow(clippy::new_without_default)]
    #[track_caller]
    pub fn new() -> Self {
        let name = format!("e2e-{}", number());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self(name)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The option of `ctr run` for a container in it.
    pub fn option(&self) -> String {
        format!("--with-ns network:/run/netns/{}", self.0)
    }

    /// `ip` in it.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ip(&self, words: &str) {
        ip(&format!("-n {} {words}", self.0));
    }

    /// Runs a command of the host in it.
    #[track_caller]
    pub fn output(&self, words: &[&str]) -> crate::Output {
        Command::new(&[&["ip", "netns", "exec", &self.0], words].concat()).output()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        quietly(&["netns", "delete", &self.0]);
    }
}
