"""The test machine under QEMU: its command line, its command port, its snapshot.

A machine directory (made by `build`) holds disk.img, vmlinux, initrd and a link to QEMU. A snapshot directory below it holds what a booted
machine left behind: `ram` (all of its memory, mapped copy-on-write by everybody who restores it), `devices` (everything
else) and `disk.qcow2` (what it had written to its disk).
"""
import hashlib
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time

import machine
from machine import MachineError, Port, die_with_parent

MEMORY_MIB = 8192
# Of several, the first runs no guests: see `init`.
CPUS = int(os.environ.get("KATANA_TEST_CPUS") or 3)
# It must have SVM with nested paging.
CPU = os.environ.get("KATANA_TEST_CPU") or "EPYC,+svm,+npt"
# A restored machine sees the same devices as the one that was saved, so the transfer disks are of one size always.
TRANSFER_DISK_BYTES = 4 << 30

# Memory is in a file that both sides map: only devices go through the migration stream.
MIGRATION_CAPABILITY = "x-ignore-shared"

# Many times what it takes: all of this host's processors may be busy with something else.
BOOT_SECONDS = 900
QMP_SECONDS = 300


def host_tsc_khz():
    """The frequency of this processor's time stamp counter, which QEMU passes to its guest.

    Linux derives BogoMIPS from the counter, exactly; "cpu MHz" moves with the processor's clock.
    """
    with open("/proc/cpuinfo") as cpuinfo:
        return int(float(re.search(r"bogomips\s*:\s*([\d.]+)", cpuinfo.read()).group(1)) * 500)


def processor(counted):
    """QEMU's arguments for the processors of the machine, of which there is only one that counts instructions.

    Counted: an instruction is a nanosecond of the machine's clock, which skips the time in which nothing runs. Runs then
    repeat within a few per cent, whatever else this host does.
    """
    if not counted:
        return ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", CPU, "-smp", str(CPUS)]
    return [
        "-accel", "tcg,thread=single,tb-size=1024", "-cpu", "EPYC,+svm,+npt,-rdrand,-rdseed", "-smp", "1",
        "-icount", "shift=0,sleep=off", "-seed", "1", "-rtc", "clock=vm,base=2026-01-01",
    ]  # fmt: skip


def kernel_arguments(machine_directory, counted):
    own = os.path.join(machine_directory, "kernel-arguments")
    return " ".join([
        "console=ttyS0 quiet panic=-1",
        # Emulated instructions are expensive, and the machine runs nothing secret.
        "mitigations=off nokaslr",
        # The emulated timers are too imprecise to calibrate against: without this the clock once ran three times too fast.
        f"tsc=reliable no_timer_check tsc_early_khz={1000000 if counted else host_tsc_khz()}",
        *(["norandmaps"] if counted else []),
        *(open(own).read().split() if os.path.exists(own) else []),
    ])


def qemu_program(machine_directory, name):
    return os.path.join(machine_directory, "qemu", "bin", name)


class Machine(machine.Machine):
    """The machine under QEMU, or the one that counts instructions."""

    logs = ("qemu.log", "console.log")

    def __init__(self, machine_directory, counted=False):
        super().__init__(machine_directory)
        self.counted = counted

    def snapshot_directory(self):
        """Where the snapshot for this QEMU on this kind of host belongs."""
        command = [qemu_program(self.directory, "qemu-system-x86_64"), "--version"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        with open(__file__) as this_file:
            text = version + " ".join([*processor(self.counted), kernel_arguments(self.directory, self.counted)]) + this_file.read()
        return os.path.join(self.directory, "snapshot-" + hashlib.sha256(text.encode()).hexdigest()[:16])

    # Bringing it up

    def boot(self, hand_in=None):
        """Starts the machine from power-on, on a fresh copy of the disk that is thrown away at the end."""
        self._start(self._memory("memory-backend-ram") + self._disk("disk.img", "raw", "snapshot=on"), hand_in)
        self.port.wait_for("ready", BOOT_SECONDS)
        self._prepare(hand_in)

    def boot_to_save(self, snapshot):
        """Starts the machine from power-on such that `save` can make a snapshot of it."""
        disk = os.path.join(snapshot, "disk.qcow2")
        create = [qemu_program(self.directory, "qemu-img"), "create", "-q", "-f", "qcow2"]
        subprocess.run([*create, "-b", "../disk.img", "-F", "raw", disk], check=True)
        ram = os.path.join(snapshot, "ram")
        self._start(self._memory(f"memory-backend-file,share=on,mem-path={ram}") + self._disk(disk, "qcow2"))
        self.port.wait_for("ready", BOOT_SECONDS)

    def save(self, snapshot):
        self._qmp("stop")
        self._enable_migration_capability()
        self._qmp("migrate", uri="exec:cat >" + shlex.quote(os.path.join(snapshot, "devices")))
        self._wait_for_migration()
        self._qmp("quit")
        self.process.wait()

    def restore(self, snapshot, hand_in=None):
        ram = os.path.join(snapshot, "ram")
        self._start(
            self._memory(f"memory-backend-file,share=off,mem-path={ram}")
            + self._disk(os.path.join(snapshot, "disk.qcow2"), "qcow2", "snapshot=on")
            + ["-incoming", "defer"],
            hand_in,
        )
        self._enable_migration_capability()
        self._qmp("migrate-incoming", uri="exec:cat " + shlex.quote(os.path.join(snapshot, "devices")))
        self._wait_for_migration()
        self._qmp("cont")
        self._prepare(hand_in)

    def _prepare(self, hand_in):
        # A restored machine believes to be in the moment when it was saved.
        line = f"date -s @{time.time():.3f} >/dev/null"
        if hand_in:
            line += " && tar -xf /dev/vdb -C /run/in"
        if self.shell(line, BOOT_SECONDS, sys.stderr.buffer) != 0:
            raise MachineError("the test machine cannot be prepared for the command")

    @staticmethod
    def _memory(backend):
        return ["-object", f"{backend},id=memory,size={MEMORY_MIB}M"]

    def _disk(self, path, image_format, *options):
        path = os.path.join(self.directory, path)
        return self._drive("root", f"file={path},format={image_format},cache=unsafe", *options)

    @staticmethod
    def _drive(name, *options):
        return ["-drive", ",".join([f"id={name},if=none", *options]), "-device", f"virtio-blk-pci,drive={name}"]

    def _start(self, memory_and_disk, hand_in=None):
        incoming, outgoing = (os.path.join(self.work, name) for name in ("in.tar", "out.tar"))
        if hand_in:
            subprocess.run(["tar", "-cf", incoming, "-C", hand_in, "."], check=True)
            if os.path.getsize(incoming) > TRANSFER_DISK_BYTES:
                raise MachineError(f"{hand_in} is too large to be handed in")
        for disk in (incoming, outgoing):
            with open(disk, "ab") as file:
                file.truncate(TRANSFER_DISK_BYTES)

        self.port_socket, qemu_port = socket.socketpair()
        self.port = Port(self.port_socket.fileno(), self.last_words)
        self.monitor, qemu_monitor = socket.socketpair()
        self.monitor.settimeout(QMP_SECONDS)
        command = [
            qemu_program(self.directory, "qemu-system-x86_64"),
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "q35,memory-backend=memory", *processor(self.counted), "-m", str(MEMORY_MIB),
            "-kernel", os.path.join(self.directory, "vmlinux"),
            "-initrd", os.path.join(self.directory, "initrd"),
            "-append", kernel_arguments(self.directory, self.counted),
            "-chardev", f"file,id=console,path={os.path.join(self.work, 'console.log')}", "-device", "isa-serial,chardev=console",
            "-chardev", f"socket,id=commands,fd={qemu_port.fileno()}", "-device", "isa-serial,chardev=commands",
            "-chardev", f"socket,id=monitor,fd={qemu_monitor.fileno()}", "-mon", "chardev=monitor,mode=control",
            *memory_and_disk,
            *self._drive("in", f"file={incoming},format=raw,readonly=on"),
            *self._drive("out", f"file={outgoing},format=raw,cache=unsafe"),
        ]  # fmt: skip
        with open(os.path.join(self.work, "qemu.log"), "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(qemu_port.fileno(), qemu_monitor.fileno()),
                preexec_fn=die_with_parent,
                # Ctrl-C is ours to handle.
                start_new_session=True,
            )  # fmt: skip
        qemu_port.close()
        qemu_monitor.close()
        self.monitor_lines = self.monitor.makefile("r")
        self._read_monitor()  # the greeting
        self._qmp("qmp_capabilities")

    # QEMU's own control socket, which speaks QMP

    def _read_monitor(self):
        line = self.monitor_lines.readline()
        if not line:
            raise MachineError("QEMU ended:\n" + self.last_words())
        return json.loads(line)

    def _qmp(self, command, **arguments):
        request = {"execute": command, "arguments": arguments}
        self.monitor.sendall(json.dumps(request).encode() + b"\n")
        while True:
            reply = self._read_monitor()
            if "error" in reply:
                raise MachineError(f"QEMU refuses {command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def _enable_migration_capability(self):
        self._qmp("migrate-set-capabilities", capabilities=[{"capability": MIGRATION_CAPABILITY, "state": True}])

    def _wait_for_migration(self):
        deadline = time.monotonic() + QMP_SECONDS
        while time.monotonic() < deadline:
            status = self._qmp("query-migrate").get("status")
            if status == "completed":
                return
            if status == "failed":
                break
            time.sleep(0.01)
        raise MachineError("the machine's state cannot be saved or restored:\n" + self.last_words())

    # Commands

    def shell(self, line, seconds, output=None, keyboard=None):
        """Runs a line of shell in the machine. A `keyboard` (a descriptor) is passed on to the command port meanwhile."""
        token = secrets.token_hex(8)
        request = f"{token} {line}\n".encode()
        if b"\n" in request[:-1] or len(request) > 4000:
            raise MachineError("a command must be one line of less than 4000 bytes: hand in a script instead")
        self.port.send(request)
        return self.port.wait_for(token, seconds, output, keyboard)

    # Results

    def fetch(self, destination):
        """Copies the machine's /run/out to a directory here."""
        if self.shell("tar -cf - -C /run/out . | dd of=/dev/vdc bs=1M conv=fsync status=none", 120) != 0:
            raise MachineError("cannot hand out /run/out")
        os.makedirs(destination, exist_ok=True)
        subprocess.run(
            ["tar", "-xf", os.path.join(self.work, "out.tar"), "-C", destination, "--no-same-owner"], check=True
        )
