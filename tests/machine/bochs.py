"""The test machine under Bochs: models of processors, configuration, snapshot.

Bochs interprets one instruction after the other. Its clock goes on by a fixed time for each of them, so runs repeat whatever else this host
does, and what the machine waits for takes no time on this host.

Its serial port is a file that is written, so a command comes on the second disk: see `init`. A machine directory (made by `build`) holds
disk.img, vmlinuz, initrd and a link to Bochs. A snapshot directory below it holds the state that Bochs saved, and the name that the
directory of its files had then.
"""
import ctypes
import hashlib
import os
import secrets
import shutil
import subprocess
import time

import machine
from machine import MachineError, Port, die_with_parent

# Instructions in a second of the machine's clock, also the frequency of its time stamp counter. A character on the serial port takes 35
# thousand instructions at this one, and with more than 429 million KVM turns VMX's preemption timer off.
IPS = 400_000_000
# More needs a file behind it.
MEMORY_MIB = 2048
# The transfer disks have whole cylinders of 16 heads and 63 sectors. A restored machine sees disks of the size that the saved one had.
TRANSFER_DISK_BYTES = 512 * 16 * 63 * 512
SECTOR_BYTES = 512

# The posted interrupts of Bochs 3.0: a descriptor that is not at the beginning of a page is refused (VM entry fails with error 7), and an
# interrupt that is being delivered when an EPT violation comes is lost.
NO_APICV = "kvm_intel.enable_apicv=0"
# By the name that `run --cpu` takes: Bochs's name, and what Linux has to be told. Sapphire Rapids: there is no XFD, without which Linux
# sets half of AMX's state in XCR0, a fault; and Bochs refuses its own CR4 after a system management interrupt.
MODELS = {
    "haswell": ("corei7_haswell_4770", ""),
    "skylake-x": ("corei7_skylake_x", NO_APICV),
    "sapphire-rapids": ("sapphire_rapids", f"{NO_APICV} clearcpuid=amx_tile no5lvl ibt=off nousershstk"),
    "arrow-lake": ("arrow_lake", NO_APICV),
    # without unrestricted guests
    "lynnfield": ("corei5_lynnfield_750", ""),
    # without EPT
    "penryn": ("core2_penryn_t9600", ""),
    "ryzen": ("ryzen", ""),
    "zambezi": ("zambezi", ""),
}

# Many times what it takes.
END_SECONDS = 300

CONFIGURATION = """\
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, parallel=0, serial=1
config_interface: textconfig
display_library: rfb, options="timeout=0, no_gui_console"
memory: guest={memory}, host={memory}
romimage: file=$BXSHARE/BIOS-bochs-latest, options=fastboot
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
pci: enabled=1, chipset=i440fx
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, mode=volatile, path={machine}/disk.img, journal={work}/disk.redolog
ata0-slave: type=disk, mode=volatile, path={work}/in.img, journal={work}/in.redolog
ata1-master: type=cdrom, path={work}/boot.iso, status=inserted
ata1-slave: type=disk, mode=flat, path={work}/out.img
boot: cdrom
cpu: model={model}, count=1, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none, time0=utc
com1: enabled=1, mode=file, dev={work}/console.log
com2: enabled=1, mode=file, dev={work}/port
log: {work}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""

ISOLINUX = """\
default machine
prompt 0
label machine
 kernel /vmlinuz
 initrd /initrd
 append {arguments}
"""


def kernel_arguments(cpu):
    return " ".join([
        "console=ttyS0,115200 quiet panic=-1",
        # As under QEMU.
        "mitigations=off nokaslr norandmaps",
        f"tsc=reliable no_timer_check tsc_early_khz={IPS // 1000}",
        MODELS[cpu][1],
    ])  # fmt: skip


class Machine(machine.Machine):
    """The machine under Bochs with one of the processors of `MODELS`."""

    logs = ("bochs.out", "bochs.log", "console.log")

    def __init__(self, machine_directory, cpu):
        super().__init__(machine_directory)
        self.cpu = cpu

    def snapshot_directory(self):
        """Where the snapshot of this model with this Bochs belongs."""
        with open(__file__) as this_file:
            text = os.path.realpath(self._bochs()) + self.cpu + this_file.read()
        return os.path.join(self.directory, "bochs-" + hashlib.sha256(text.encode()).hexdigest()[:16])

    # Bringing it up: Bochs starts with the command, so that this is there at the same moment of the machine's clock always.

    def boot(self, hand_in=None):
        """The machine will start from power-on, with a disk that forgets."""
        self.hand_in = hand_in
        self._make_boot_disc()
        configuration = os.path.join(self.work, "bochsrc")
        with open(configuration, "w") as file:
            file.write(
                CONFIGURATION.format(
                    memory=MEMORY_MIB, machine=self.directory, work=self.work, model=MODELS[self.cpu][0], ips=IPS
                )
            )
        self._arguments = ["-f", configuration]

    def boot_to_save(self, _snapshot):
        self.boot()

    def save(self, snapshot):
        state = os.path.join(snapshot, "state")
        os.mkdir(state)
        # Bochs asks where to, then whether to go on.
        self.process.stdin.write(f"{state}\nn\n".encode())
        self.process.stdin.flush()
        press_suspend = os.path.join(os.path.dirname(os.path.abspath(__file__)), "press-suspend")
        subprocess.run([press_suspend, str(self.process.pid)], check=True)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise MachineError("Bochs does not save the machine:\n" + self.last_words()) from None
        # What was handed out is not of interest any more.
        for size in (0, TRANSFER_DISK_BYTES):
            os.truncate(os.path.join(state, "hard_drive.1.drive1.image"), size)
        with open(os.path.join(snapshot, "work"), "w") as file:
            file.write(self.work)

    def restore(self, snapshot, hand_in=None):
        """The machine will go on from a snapshot. Bochs reads it in place, but for the names of files in its configuration."""
        self.hand_in = hand_in
        with open(os.path.join(snapshot, "work")) as file:
            saved_work = file.read()
        saved, state = os.path.join(snapshot, "state"), os.path.join(self.work, "state")
        os.mkdir(state)
        for name in os.listdir(saved):
            os.symlink(os.path.join(saved, name), os.path.join(state, name))
        os.unlink(os.path.join(state, "config"))
        with open(os.path.join(saved, "config")) as old, open(os.path.join(state, "config"), "w") as new:
            new.write(old.read().replace(saved_work, self.work))
        self._make_boot_disc()
        self._arguments = ["-r", state]

    def _make_boot_disc(self):
        tree = os.path.join(self.work, "boot")
        os.makedirs(os.path.join(tree, "isolinux"))
        for name in ("vmlinuz", "initrd"):
            shutil.copy(os.path.join(self.directory, name), tree)
        for name in ("isolinux.bin", "ldlinux.c32"):
            shutil.copy(os.path.join(self._bochs(), "boot", name), os.path.join(tree, "isolinux"))
        with open(os.path.join(tree, "isolinux", "isolinux.cfg"), "w") as file:
            file.write(ISOLINUX.format(arguments=kernel_arguments(self.cpu)))
        xorriso = [os.path.join(self._bochs(), "bin", "xorriso"), "-as", "mkisofs", "-quiet"]
        loader = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"]
        loader += ["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
        disc = os.path.join(self.work, "boot.iso")
        subprocess.run([*xorriso, "-o", disc, *loader, tree], check=True, stderr=subprocess.DEVNULL)
        shutil.rmtree(tree)

    def _bochs(self):
        return os.path.join(self.directory, "bochs")

    def _start(self):
        port = os.path.join(self.work, "port")
        os.mkfifo(port)
        # Both ends, so that neither side waits for the other to open it.
        self.port = Port(os.open(port, os.O_RDWR), self.last_words)
        environment = {
            **os.environ,
            "LTDL_LIBRARY_PATH": os.path.join(self._bochs(), "plugins"),
            "BXSHARE": os.path.join(self._bochs(), "firmware"),
        }
        with open(os.path.join(self.work, "bochs.out"), "wb") as log:
            self.process = subprocess.Popen(
                [os.path.join(self._bochs(), "bin", "bochs"), "-q", *self._arguments],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environment,
                preexec_fn=enter_own_network,
                start_new_session=True,
            )  # fmt: skip

    # Commands

    def shell(self, line, seconds, output=None):
        """Starts the machine and runs a line of shell in it, once. Returns its exit code; what it left in /run/out can be fetched then."""
        if self.process:
            raise MachineError("a machine under Bochs runs one command")
        token = secrets.token_hex(8)
        # A restored machine believes to be in the moment when it was saved.
        self._make_transfer_disks(f"date -s @{time.time():.3f} >/dev/null; {line}", token)
        self._start()
        return self.port.wait_for(token, seconds, output)

    def _make_transfer_disks(self, line, token):
        with open(os.path.join(self.work, "command"), "w") as file:
            file.write(line + "\n")
        tar = ["tar", "-c", *(["-C", self.hand_in, "."] if self.hand_in else []), "-C", self.work, "command"]
        for name in ("in.img", "out.img"):
            with open(os.path.join(self.work, name), "ab") as file:
                file.truncate(TRANSFER_DISK_BYTES)
        with open(os.path.join(self.work, "in.img"), "r+b") as file:
            subprocess.run(tar, stdout=file, check=True)
            if file.seek(0, os.SEEK_CUR) > TRANSFER_DISK_BYTES - SECTOR_BYTES:
                raise MachineError(f"{self.hand_in} is too large to be handed in")
            # init waits for this.
            file.seek(TRANSFER_DISK_BYTES - SECTOR_BYTES)
            file.write(token.encode())
        # A disk that forgets has to be as old as the one that was saved.
        os.utime(os.path.join(self.work, "in.img"), (0, 0))

    # Results

    def fetch(self, destination):
        """Copies what was in the machine's /run/out at the end of the last command to a directory here."""
        os.makedirs(destination, exist_ok=True)
        results = os.path.join(self.work, "out.img")
        subprocess.run(["tar", "-xf", results, "-C", destination, "--no-same-owner"], check=True)


def enter_own_network():
    """Bochs's display listens to everybody, so it gets a network where nobody else is."""
    die_with_parent()
    clone_newnet = 0x40000000
    if ctypes.CDLL(None).unshare(clone_newnet) != 0:
        raise OSError("cannot make a network namespace for Bochs")
