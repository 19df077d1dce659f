//! What else starts containers or virtual machines: gVisor's runsc, and QEMU's smallest machine with Katana's guest
//! kernel. `tests/machine/peers` unpacks both; one that is not in PATH, or does not work here, is skipped, and named
//! with the reason.

use std::path::PathBuf;
use std::time::Duration;

use katana_tests::environment::{self, RUNC};
use katana_tests::{BUSYBOX, Command, Configuration, Run};

/// Why there are no figures of a peer.
pub type Skipped = String;

/// gVisor. Debian's package has no shim for containerd, so it runs as Docker runs it: below runc's shim, in runc's
/// place.
pub struct Runsc(PathBuf);

impl Runsc {
    /// Looks for it, and whether it can run a container.
    pub fn find() -> Result<Self, Skipped> {
        let runsc = Self(find("runsc")?);
        let run = Run::new(BUSYBOX).runtime(RUNC).options(&runsc.options()).command(&["true"]).output();
        let error = || run.errors().lines().last().unwrap_or_default().to_owned();
        if run.code == 0 { Ok(runsc) } else { Err(format!("it does not run here: {}", error())) }
    }

    /// What `ctr run` needs beside runc's shim.
    pub fn options(&self) -> String {
        format!("--runc-binary {}", self.0.display())
    }
}

/// The guest's kernel in `qemu-system-x86_64 -M microvm`, as far as it comes there. That machine's devices are on
/// virtio-mmio, or on a PCI bus that only ACPI describes. The guest's kernel knows neither, nor an initramfs: it
/// initializes all that it has, finds no root file system, panics, and so resets the machine. QEMU takes that as the
/// machine's end.
pub struct MicroVm {
    program: PathBuf,
    kernel: String,
}

/// The machine without what can be left out.
const MACHINE: &str = "microvm,acpi=off,pic=off,pit=off,rtc=off,x-option-roms=off,isa-serial=";
/// As kata-vmm's, but for devices, and with a reset by triple fault: the machine has no keyboard controller.
const KERNEL_PARAMETERS: &str =
    "reboot=t panic=-1 no_timer_check tsc=reliable cryptomgr.notests dummy.numdummies=0";
/// What the kernel has come to when it panics as it has to.
const LAST_WORDS: &str = "VFS: Unable to mount root fs";

impl MicroVm {
    /// Looks for it, and whether the kernel comes to its last words.
    pub fn find() -> Result<Self, Skipped> {
        let program = find("qemu-system-x86_64-microvm")?;
        let kernel = Configuration::installed().text("hypervisor.katana.kernel");
        let machine = Self { program, kernel };
        let run = machine.command("on", &format!("{KERNEL_PARAMETERS} earlyprintk=ttyS0"), "stdio").output();
        let text = run.text();
        if run.code == 0 && text.contains(LAST_WORDS) {
            return Ok(machine);
        }
        let errors = run.errors();
        let last = errors.lines().chain(text.lines()).last().unwrap_or_default();
        Err(format!("the guest's kernel does not boot in it, exit code {}: {last}", run.code))
    }

    /// One boot, from QEMU's start to its end.
    pub fn boot(&self) -> Duration {
        self.command("off", KERNEL_PARAMETERS, "none").output().ok().elapsed
    }

    fn command(&self, serial_port: &str, parameters: &str, console: &str) -> Command {
        let (program, machine) = (self.program.display().to_string(), format!("{MACHINE}{serial_port}"));
        let mut words = vec![program.as_str(), "-M", &machine, "-enable-kvm", "-cpu", "host", "-m", "128"];
        words.extend(["-kernel", &self.kernel, "-append", parameters, "-serial", console]);
        words.extend(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]);
        Command::new(&words)
    }
}

fn find(program: &str) -> Result<PathBuf, Skipped> {
    if environment::is_counted() {
        return Err("not measured in counted instructions".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|directory| directory.join(program));
    places.find(|place| place.is_file()).ok_or_else(|| format!("no {program} in PATH"))
}
