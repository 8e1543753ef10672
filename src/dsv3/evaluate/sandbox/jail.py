"""The inner side of the sandbox: shut the doors, then become the program. Run as ``python -I -S jail.py``.

It is started by :mod:`dsv3.evaluate.sandbox.run`, compiled beforehand, and imports very little: its start is
paid for by every program. Arguments: a fresh folder holding ``program.py``; the level; a descriptor that is
told ``ok`` or what failed, and is closed before the program starts; whether to end with the thread that
started it; the limits (bytes of memory, seconds of processor time, processes, bytes of disk); Python's
folders; ``--``; more folders to read and import from.

``namespaces``: a network without interfaces, a process tree of its own (its end is everyone's end), a file
tree made of Python's folders, read-only, and an empty ``/tmp`` of bounded size. As root the program becomes a
user of its own. ``filters``: no new processes, no sockets, no signals (seccomp), no files but the same
(Landlock); for containers that refuse namespaces. Resource limits hold at every level.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
NEWCGROUP, THREAD = 1 << 25, 1 << 16
RDONLY, NOSUID, NODEV, BIND, REC, PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")  # Python's shared libraries; world-readable on every machine

# fmt: off
CALLS = {  # x86-64, ARM64
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "io_uring_setup": (425, 425), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "open_by_handle_at": (304, 265), "reboot": (169, 142), "swapon": (167, 224), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
}
ALONE = {  # denied besides where there is no process tree of its own
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "setsid": (112, 157), "setpgid": (109, 154),
    "fork": (57, None), "vfork": (58, None),
}
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
# fmt: on
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, audit's name

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """A C function that returns -1 and sets errno; raises OSError with its name."""
    result: int = getattr(libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: Any) -> int:
    """A system call by its number, pointers and lengths as given."""
    return call("syscall", ctypes.c_long(number), *arguments)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); None as ``kind`` where a tree is only moved or bound."""
    call(
        "mount",
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )


def namespaces(base: str, read: list[str], disk: int, tied: bool) -> None:
    """Leave the machine's network, processes, users and files; returns in process 1 of the new tree.

    The old process stays behind, waits, and ends as its child did.
    """
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        call("unshare", flags)
    else:
        call("unshare", flags | NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"65534 {uid} 1"),
            ("gid_map", f"65534 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if tied:
        call("prctl", 1, 9)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:  # end by the same signal, so that the outside sees it
            os.kill(os.getpid(), -code)
        os._exit(code)

    mount("none", "/", None, REC | PRIVATE)
    root = os.path.join(base, "root")
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, f"size={disk},nr_inodes=4096,mode=755")
    for path in (*SYSTEM, *read):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path) and not os.path.exists(root + path):
            os.makedirs(root + path)
            mount(path, root + path, None, BIND | REC)
            attributes = (ctypes.c_uint64 * 4)(RDONLY | NOSUID, 0, 0, 0)
            at_recursive = 0x8000
            syscall(442, -100, (root + path).encode(), at_recursive, attributes, ctypes.c_size_t(32))
    os.mkdir(root + "/dev")
    for path in ("/dev/null", "/dev/urandom"):
        open(root + path, "w").close()
        mount(path, root + path, None, BIND)
    os.makedirs(root + "/tmp", exist_ok=True)  # a folder to read may lie below it
    os.chmod(root + "/tmp", 0o777)
    os.chdir(root)
    column = MACHINES[os.uname().machine][0]
    syscall(CALLS["pivot_root"][column], b".", b".")
    call("umount2", b".", 2)  # MNT_DETACH: the old root
    os.chdir("/tmp")
    if uid == 0:
        own = 1_000_000_000 + os.getpid()
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    no_capabilities()
    # Last, for a change of user undoes it; a program that left the process group is reached by this alone.
    call("prctl", 1, 9)  # PR_SET_PDEATHSIG: process 1 ends with the one who waits


def no_capabilities() -> None:
    """Give up what the new namespaces' owner could still do in them."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def landlock(base: str, read: list[str]) -> None:
    """No files but Python's to read and the empty folder to write, no signals outside."""
    version = syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 3:
        raise OSError(errno.ENOSYS, "Landlock is older than version 3")
    every = (1 << (16 if version >= 5 else 15)) - 1
    attributes = (ctypes.c_uint64 * 3)(every, 0, 3 if version >= 6 else 0)
    ruleset = syscall(444, attributes, ctypes.c_size_t(24 if version >= 6 else 8), 0)

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("access", ctypes.c_uint64), ("folder", ctypes.c_int32))

    look, device = 1 | 4 | 8, 2 | 4  # execute, read files and folders; write, read
    rules = [(path, look) for path in (*SYSTEM, *read)]
    rules += [("/dev/null", device), ("/dev/urandom", 4), (os.path.join(base, "work"), every)]
    for path, access in rules:
        if os.path.exists(path):
            descriptor = os.open(path, 0x200000)  # O_PATH
            syscall(445, ruleset, 1, ctypes.byref(Beneath(access, descriptor)), 0)
            os.close(descriptor)
    call("prctl", 38, 1, 0, 0, 0)
    syscall(446, ruleset, 0)
    os.close(ruleset)


def seccomp(alone: bool) -> None:
    """Refuse (EPERM) system calls that reach the network, other processes or the kernel's rarer rooms.

    ``alone``: the program shares the machine's process tree and may not start processes or send signals.
    """
    column, machine = MACHINES[os.uname().machine]
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((0x20, 0, 0, offset))

    def answer(action: int) -> None:
        code.append((0x06, 0, 0, action))

    refuse, missing, allow = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x7FFF0000
    load(4)  # the architecture
    code.append((0x15, 1, 0, machine))
    answer(0x80000000)  # kill: numbers of another architecture would slip through
    load(0)
    code.append((0x35, 0, 1, 0x40000000))  # x32 on x86-64
    answer(refuse)
    for number in (pair[column] for pair in (CALLS | (ALONE if alone else {})).values()):
        if number is not None:
            code.append((0x15, 0, 1, number))
            answer(refuse)
    code.append((0x15, 0, 1, CLONE3[column]))  # its flags lie behind a pointer; the C library then uses clone
    answer(missing)
    code.append((0x15, 0, 5 if alone else 3, CLONE[column]))
    load(16)
    code.append((0x45, 0, 1, NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWCGROUP))
    answer(refuse)
    if alone:
        code.append((0x45, 1, 0, THREAD))
        answer(refuse)
    load(0)
    code.append((0x15, 0, 3, PRLIMIT[column]))  # of itself only
    load(16)
    code.append((0x15, 1, 0, 0))
    answer(refuse)
    answer(allow)

    class Instruction(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)
        )  # fmt: skip

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("code", ctypes.c_void_p))

    array = (Instruction * len(code))(*[Instruction(*row) for row in code])
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("prctl", 22, 2, ctypes.byref(Filter(len(code), ctypes.addressof(array))), 0, 0)  # PR_SET_SECCOMP


def limit(memory: int, cpu: int, processes: int, file_size: int) -> None:
    """Resource limits of the process and of each of its children; soft and hard alike."""
    for name, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def main() -> None:
    """Shut the doors, say so, become ``program.py``; exit code 125 where a door would not shut."""
    base, level, *numbers = sys.argv[1:9]
    status, tied, memory, cpu, processes, disk = map(int, numbers)
    read, path = sys.argv[9 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    with open(os.path.join(base, "program.py"), encoding="utf-8") as file:
        source = file.read()
    try:
        if level == "namespaces":
            namespaces(base, read + path, disk, bool(tied))
        else:
            os.chdir(os.path.join(base, "work"))
            if tied and sys.platform == "linux":
                call("prctl", 1, 9)
        if level == "filters":
            landlock(base, read + path)
        limit(memory, cpu, processes, disk)
        if level != "limits":
            seccomp(alone=level == "filters")
    except (OSError, ValueError, KeyError) as error:
        os.write(status, f"{type(error).__name__}: {error}".encode())
        os._exit(125)
    os.write(status, b"ok")
    os.close(status)
    sys.argv[:] = ["program.py"]
    sys.path[:0] = path
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(source, "program.py", "exec", dont_inherit=True), space)


if __name__ == "__main__":
    main()
