"""The test machine under QEMU: its command line, its command port, its snapshot.

A machine directory (made by `build`) holds disk.img, vmlinux, initrd and a link to QEMU. A snapshot directory below it holds what a booted
machine left behind: `ram` (all of its memory, mapped copy-on-write by everybody who restores it), `devices` (everything
else) and `disk.qcow2` (what it had written to its disk).
"""
import ctypes
import hashlib
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

MEMORY_MIB = 8192
# Of several, the first runs no guests: see `init`.
CPUS = int(os.environ.get("KATANA_TEST_CPUS") or 3)
# It must have SVM with nested paging.
CPU = os.environ.get("KATANA_TEST_CPU") or "EPYC,+svm,+npt"
# A restored machine sees the same devices as the one that was saved, so the transfer disks are of one size always.
TRANSFER_DISK_BYTES = 4 << 30

SNAPSHOT_FILES = ("ram", "devices", "disk.qcow2")
# Memory is in a file that both sides map: only devices go through the migration stream.
MIGRATION_CAPABILITY = "x-ignore-shared"

# What a command printed is followed by this mark: see `init`. Its beginning may arrive before the rest.
END_MARK = rb"\x1e%s (\d+)\n"
UNFINISHED_END_MARK = re.compile(rb"\x1e\w*(?: \d*)?\Z")

# Many times what it takes: all of this host's processors may be busy with something else.
BOOT_SECONDS = 900
QMP_SECONDS = 300


class MachineError(Exception):
    """The machine could not be brought up, or stopped answering."""


class MachineTimeout(MachineError):
    """A command took longer than it may."""


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


def kernel_arguments(counted):
    return " ".join([
        "console=ttyS0 quiet panic=-1",
        # Emulated instructions are expensive, and the machine runs nothing secret.
        "mitigations=off nokaslr",
        # The emulated timers are too imprecise to calibrate against: without this the clock once ran three times too fast.
        f"tsc=reliable no_timer_check tsc_early_khz={1000000 if counted else host_tsc_khz()}",
        *(["norandmaps"] if counted else []),
    ])


def qemu_program(machine_directory, name):
    return os.path.join(machine_directory, "qemu", "bin", name)


def snapshot_directory(machine_directory, counted=False):
    """Where the snapshot for this QEMU on this kind of host belongs."""
    command = [qemu_program(machine_directory, "qemu-system-x86_64"), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with open(__file__) as this_file:
        text = version + " ".join([*processor(counted), kernel_arguments(counted)]) + this_file.read()
    return os.path.join(machine_directory, "snapshot-" + hashlib.sha256(text.encode()).hexdigest()[:16])


def is_complete(snapshot):
    return all(os.path.exists(os.path.join(snapshot, name)) for name in SNAPSHOT_FILES)


def die_with_parent():
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Machine:
    """One run of QEMU. Use as a context manager: leaving it ends QEMU and removes every temporary file."""

    def __init__(self, machine_directory, counted=False):
        self.directory = machine_directory
        self.counted = counted
        self.work = tempfile.mkdtemp(prefix="katana-machine.")
        self.process = None
        self.received = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.work, ignore_errors=True)

    # Bringing it up

    def boot(self, hand_in=None):
        """Starts the machine from power-on, on a fresh copy of the disk that is thrown away at the end."""
        self._start(self._memory("memory-backend-ram") + self._disk("disk.img", "raw", "snapshot=on"), hand_in)
        self._wait_for("ready", BOOT_SECONDS)

    def boot_to_save(self, snapshot):
        """Starts the machine from power-on such that `save` can make a snapshot of it."""
        disk = os.path.join(snapshot, "disk.qcow2")
        create = [qemu_program(self.directory, "qemu-img"), "create", "-q", "-f", "qcow2"]
        subprocess.run([*create, "-b", "../disk.img", "-F", "raw", disk], check=True)
        ram = os.path.join(snapshot, "ram")
        self._start(self._memory(f"memory-backend-file,share=on,mem-path={ram}") + self._disk(disk, "qcow2"))
        self._wait_for("ready", BOOT_SECONDS)

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

        self.port, qemu_port = socket.socketpair()
        self.monitor, qemu_monitor = socket.socketpair()
        self.monitor.settimeout(QMP_SECONDS)
        command = [
            qemu_program(self.directory, "qemu-system-x86_64"),
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "q35,memory-backend=memory", *processor(self.counted), "-m", str(MEMORY_MIB),
            "-kernel", os.path.join(self.directory, "vmlinux"),
            "-initrd", os.path.join(self.directory, "initrd"),
            "-append", kernel_arguments(self.counted),
            "-chardev", f"file,id=console,path={self._console_log()}", "-device", "isa-serial,chardev=console",
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

    def command(self, words, seconds, output=None):
        """Runs a command in the machine, streams what it prints to `output` (a binary file), returns its exit code."""
        return self.shell(shlex.join(words), seconds, output)

    def shell(self, line, seconds, output=None, keyboard=None):
        """Runs a line of shell in the machine. A `keyboard` (a descriptor) is passed on to the command port meanwhile."""
        token = secrets.token_hex(8)
        request = f"{token} {line}\n".encode()
        if b"\n" in request[:-1] or len(request) > 4000:
            raise MachineError("a command must be one line of less than 4000 bytes: hand in a script instead")
        self.port.sendall(request)
        return self._wait_for(token, seconds, output, keyboard)

    def _wait_for(self, token, seconds, output=None, keyboard=None):
        """Reads the command port up to the end mark of `token` (see `init`); returns the exit code beside it."""
        end_mark = re.compile(END_MARK % token.encode())
        deadline = time.monotonic() + seconds if seconds else None
        while True:
            found = end_mark.search(self.received)
            unfinished = UNFINISHED_END_MARK.search(self.received)
            printable = (found or unfinished).start() if found or unfinished else len(self.received)
            if output:
                output.write(self.received[:printable])
                output.flush()
            if found:
                self.received = self.received[found.end() :]
                return int(found.group(1))
            self.received = self.received[printable:]
            self._receive(deadline, seconds, keyboard)

    def _receive(self, deadline, seconds, keyboard):
        sources = [self.port] if keyboard is None else [self.port, keyboard]
        left = max(0, deadline - time.monotonic()) if deadline else None
        ready, _, _ = select.select(sources, [], [], left)
        if not ready:
            raise MachineTimeout(f"no end after {seconds} s; killed")
        if keyboard in ready:
            self.port.sendall(os.read(keyboard, 1024))
        if self.port in ready:
            data = self.port.recv(1 << 16)
            if not data:
                raise MachineError("the test machine ended by itself:\n" + self.last_words())
            self.received += data

    # Results

    def fetch(self, destination):
        """Copies the machine's /run/out to a directory here."""
        if self.shell("tar -cf - -C /run/out . | dd of=/dev/vdc bs=1M conv=fsync status=none", 120) != 0:
            raise MachineError("cannot hand out /run/out")
        os.makedirs(destination, exist_ok=True)
        subprocess.run(
            ["tar", "-xf", os.path.join(self.work, "out.tar"), "-C", destination, "--no-same-owner"], check=True
        )

    def _console_log(self):
        return os.path.join(self.work, "console.log")

    def last_words(self):
        """What QEMU and the machine's kernel said last."""
        lines = []
        for path in (os.path.join(self.work, "qemu.log"), self._console_log()):
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    # QEMU lists what its emulated EPYC lacks, which nobody asked for.
                    lines += [line for line in file.read().splitlines() if "TCG doesn't support" not in line][-40:]
        return "\n".join(lines)


def end_on_signals():
    """Makes SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that nothing is left behind."""

    def unwind(number, _):
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, unwind)
