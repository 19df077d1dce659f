"""What the test machines under QEMU and Bochs have in common: their files here, and the serial port on which they print."""
import ctypes
import os
import re
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time

# What a command printed is followed by this mark. Its beginning may arrive before the rest.
END_MARK = rb"\x1e%s (\d+)\n"
UNFINISHED_END_MARK = re.compile(rb"\x1e\w*(?: \d*)?\Z")


class MachineError(Exception):
    """The machine could not be brought up, or stopped answering."""


class MachineTimeout(MachineError):
    """A command took longer than it may."""


class Machine:
    """One run of an emulator. Use as a context manager: leaving it ends the emulator and removes every temporary file.

    Whoever inherits from it has `start(snapshot, hand_in)`, `shell(line, seconds, output)`, `fetch(destination)`, and what `save-snapshot`
    calls besides. It puts its logs to `logs`, the last of which is the machine's console.
    """

    logs = ()

    def __init__(self, machine_directory):
        self.directory = machine_directory
        self.work = tempfile.mkdtemp(prefix="katana-machine.")
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.work, ignore_errors=True)

    def command(self, words, seconds, output=None):
        """Runs a command in the machine, streams what it prints to `output` (a binary file), returns its exit code."""
        return self.shell(shlex.join(words), seconds, output)

    def last_words(self):
        """What the emulator and the machine's kernel said last."""
        lines = []
        for name in self.logs:
            path = os.path.join(self.work, name)
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    # QEMU lists what its emulated EPYC lacks, which nobody asked for.
                    lines += [line for line in file.read().splitlines() if "TCG doesn't support" not in line][-40:]
        return "\n".join(lines)


class Port:
    """This side of the serial port, a descriptor that can be read and, if the machine takes input there, written."""

    def __init__(self, descriptor, last_words):
        self.descriptor = descriptor
        self.last_words = last_words
        self.received = b""

    def send(self, data):
        while data:
            data = data[os.write(self.descriptor, data) :]

    def wait_for(self, token, seconds, output=None, keyboard=None):
        """Reads up to the end mark of `token` and streams what precedes it to `output` (a binary file); returns the exit code beside
        the mark. A `keyboard` (a descriptor) is passed on meanwhile."""
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
        sources = [self.descriptor] if keyboard is None else [self.descriptor, keyboard]
        left = max(0, deadline - time.monotonic()) if deadline else None
        ready, _, _ = select.select(sources, [], [], left)
        if not ready:
            raise MachineTimeout(f"no end after {seconds} s; killed")
        if keyboard in ready:
            self.send(os.read(keyboard, 1024))
        if self.descriptor in ready:
            data = os.read(self.descriptor, 1 << 16)
            if not data:
                raise MachineError("the test machine ended by itself:\n" + self.last_words())
            self.received += data


def die_with_parent():
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def end_on_signals():
    """Makes SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that nothing is left behind."""

    def unwind(number, _):
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, unwind)
