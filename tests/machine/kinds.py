"""Which of the test machines is meant: the options that `run`, `build` and `save-snapshot` have in common."""
import bochs
import qemu


def add_options(parser):
    parser.add_argument(
        "--cpu", choices=sorted(bochs.MODELS), help="a machine with this processor, under Bochs (else: AMD's, under QEMU)"
    )
    parser.add_argument("--kernel", metavar="SUITE", help="the machine with the kernel of another of Debian's releases")
    parser.add_argument("--counted", action="store_true", help="the machine under QEMU whose clock counts instructions")


def options(arguments):
    """The same options for another program."""
    if arguments.cpu:
        return ["--cpu", arguments.cpu]
    if arguments.kernel:
        return ["--kernel", arguments.kernel]
    return ["--counted"] if arguments.counted else []


def machine(directory, arguments):
    if arguments.cpu:
        return bochs.Machine(directory, arguments.cpu)
    return qemu.Machine(directory, arguments.counted)
