//! What a guest does ahead if a template is to be made of it, so that those which come from it need not each do it for
//! themselves: that takes time at each start, and pages of each guest's own for what the kernel notes down of it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use katana_protocol::bridge;
use nix::sys::sysinfo::sysinfo;

use crate::cgroup;
use crate::device_filter::DeviceFilter;
use crate::pci;

/// A cgroup that stays, with a device filter: with the first of each, the kernel changes its own code in dozens of
/// places (static keys), so as to count what each cgroup uses, and to ask the filters.
const CGROUP: &str = "warm-up";
/// The kernel reports no more free memory at a time than this, in blocks of 4 MiB (page_reporting_cycle), and then puts
/// the rest off by two seconds.
const REPORTED_AT_ONCE: u64 = 32 * (4 << 20);
/// Somebody waits for the first start: the rest of a large memory is left to those that come from the template.
const MOST_ROUNDS: u64 = 16;
/// What it may take for that: user space is not notified of it, and so has nothing to wait for. A template made too
/// early is a little larger, that is all.
const MOMENT: Duration = Duration::from_millis(20);

/// Does all of it. Time is let pass since the kernel reports its free pages two seconds after it has booted, and takes
/// note of that in dozens of places.
///
/// # Errors
/// With what could not be done. The guest is as good without.
pub fn warm_up(host_bridge: &File) -> io::Result<()> {
    let cgroup = Path::new(cgroup::ROOT).join(CGROUP);
    fs::create_dir(&cgroup)?;
    DeviceFilter::attach(&[], &cgroup, None).map_err(io::Error::other)?;
    pci::scan()?;
    let memory = sysinfo().map_err(io::Error::from)?.ram_total();
    for _ in 0..(memory.div_ceil(REPORTED_AT_ONCE) + 1).min(MOST_ROUNDS) {
        host_bridge.write_at(&[bridge::LATER], bridge::REGISTER)?;
        std::thread::sleep(MOMENT);
    }
    Ok(())
}
