//! Where a pod's machine begins: at its kernel's entry, or where a template stopped.

use std::os::fd::{AsFd, BorrowedFd};

use katana_config::Config;
use katana_protocol::vmm::{Machine, Template};
use katana_template::{Draft, Error, Found, Store};
use tokio::sync::watch;

use crate::guest::vmm::Vmm;
use crate::host::threads;

/// [`Start::name`] of a machine that boots.
pub const BOOT: &str = "boot";
/// Of one that is restored.
pub const TEMPLATE: &str = "template";

/// Where a machine begins.
pub enum Start {
    /// It boots.
    Boot,
    /// It boots, and becomes the template for those after it.
    First(Box<Draft>),
    /// It is restored from a template.
    Template(Found),
}

impl Start {
    /// The best start that there is for a pod with this configuration, of this namespace, whose own machine would be
    /// this one. That there is no template is no reason for a pod not to start, only for a line in the log.
    pub fn choose(config: &Config, namespace: &str, own: &Machine) -> Self {
        let hypervisor = &config.hypervisor;
        if !config.factory.enable_template
            || hypervisor.enable_debug
            || own.net_slots > katana_template::NET_SLOTS
            || u32::from(own.disk_slots) > hypervisor.disk_slots
        {
            return Self::Boot;
        }
        match find(config, namespace) {
            Ok(start) => start,
            Err(Error::Busy) => {
                log::info!("no template yet: another pod's start makes it");
                Self::Boot
            }
            Err(e) => {
                log::warn!("no template: {e}; the VM boots without it");
                Self::Boot
            }
        }
    }

    /// In a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Boot => BOOT,
            Self::First(_) => "boot_for_template",
            Self::Template(_) => TEMPLATE,
        }
    }

    /// The machine to ask for, where one that boots for itself would be `own`.
    pub fn machine(&self, config: &Config, own: Machine) -> Machine {
        let template = match self {
            Self::Boot => return own,
            Self::First(_) => Template::Make,
            Self::Template(_) => Template::Use,
        };
        Machine { template, guest_cid: own.guest_cid, ..katana_template::machine(config) }
    }

    /// The file that the VMM gets.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Boot => None,
            Self::First(draft) => Some(draft.file().as_fd()),
            Self::Template(found) => Some(found.file().as_fd()),
        }
    }

    /// Has the template, if this start is to make one, put in its place when the VMM has made it; and taken away if it
    /// turns out to be of no use, so that the next start makes another.
    ///
    /// `known`: is over as soon as the guest knows a pod.
    pub fn expect(self, vmm: &Vmm, known: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Boot => {}
            Self::First(draft) => drop(tokio::spawn(finish(*draft, vmm.template(), known))),
            Self::Template(found) => drop(tokio::spawn(doubt(found, vmm.template()))),
        }
    }
}

fn find(config: &Config, namespace: &str) -> Result<Start, Error> {
    let store = Store::of(config, namespace)?;
    match store.open()? {
        Some(found) => Ok(Start::Template(found)),
        None => Ok(Start::First(Box::new(store.begin()?))),
    }
}

/// The VMM's word on a template.
type Word = watch::Receiver<Option<Result<(), String>>>;

/// Waits for the VMM to find something wrong.
async fn doubt(found: Found, mut word: Word) {
    let why = match word.wait_for(Option::is_some).await {
        Ok(word) => word.clone().and_then(Result::err),
        Err(_) => None,
    };
    if let Some(why) = why {
        log::warn!("template: {why}; the VM boots without it, and the next makes another");
        if let Err(e) = in_store(move || found.remove()).await {
            log::warn!("template: {e}");
        }
    }
}

/// Waits for the VMM's word. Without a template at its end the next start tries again.
///
/// A word that comes when the guest knows a pod already is none: the agent speaks before it connects, and what a
/// container may have had a hand in, be it by way of the VMM, is not for other pods.
async fn finish(draft: Draft, mut made: Word, known: impl Future<Output = ()>) {
    let made = tokio::select! {
        // What the VMM has reported is handled in the order in which it was reported.
        biased;
        made = made.wait_for(Option::is_some) => made.ok().and_then(|made| made.clone()),
        () = known => return log::warn!("no template: the guest's agent has not said that one can be made of it"),
    };
    let made = match made {
        Some(Ok(())) => in_store(move || draft.commit()).await.map_err(|e| e.to_string()),
        Some(Err(why)) => Err(why),
        None => Err("the VM ended before it was made".to_owned()),
    };
    match made {
        Ok(()) => log::info!("the template is made"),
        Err(why) => log::warn!("no template: {why}"),
    }
}

/// What blocks on the directory of templates.
async fn in_store(work: impl FnOnce() -> Result<(), Error> + Send + 'static) -> crate::error::Result<()> {
    threads::blocking(move || work().map_err(|e| crate::error::Error::Host(e.to_string()))).await
}
