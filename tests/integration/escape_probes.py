"""Ways out of a cage, as functions that need nothing but the standard library.

The same text runs on the machine, where each attempt must succeed (the control), and in a cage, where each
must fail as the table in test_escape.py says. An attempt returns "OK" when it succeeded, otherwise an errno's
name, a signal's name, or "NONE".
"""

# Each line is one system call, as an attacker would make it.
# ruff: noqa: PTH101, PTH102, PTH106, PTH108, PTH123, PTH208, PTH211

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]
Probe = Callable[[Facts], str]
X86 = os.uname().machine == "x86_64"
LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = {
    # On x86-64, on arm64.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "unshare": (272, 97), "setns": (308, 268),
    "clone": (56, 220), "clone3": (435, 435), "mount": (165, 40), "fsopen": (430, 430), "open_tree":
    (428, 428), "chroot": (161, 51), "sethostname": (170, 161), "add_key": (248, 217),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open":
    (298, 241), "memfd_create": (319, 279), "name_to_handle_at": (303, 264), "personality": (135,
    92), "syslog": (103, 116), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "pidfd_getfd": (438, 438), "pidfd_open": (434, 434), "getpid": (39, 172), "kcmp": (312, 272),
    "execveat": (322, 281), "fanotify_init": (300, 262),
}  # fmt: skip


def call(name: str, *arguments: Any) -> int:
    number = NUMBERS[name][0 if X86 else 1]
    return call_number(number, *arguments)


def call_number(number: int, *arguments: Any) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(LIBC.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def succeed(*_: object) -> str:
    """Whatever did not raise has succeeded."""
    return "OK"


def opened(path: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> str:
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode))
    return "OK"


def spawn(argv: list[str]) -> str:
    """Run a program to its end: "OK" for exit status 0."""
    null = os.open("/dev/null", os.O_RDWR)
    silent = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (1, 2)]
    child = os.posix_spawn(argv[0], argv, {}, file_actions=silent)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "OK" if status == 0 else f"EXIT{status}"


# --- files ---------------------------------------------------------------------------------------


def read_outside(facts: Facts) -> str:
    return opened(facts["secret"])


def read_shadow(_: Facts) -> str:
    return opened("/etc/shadow")


def list_root_home(_: Facts) -> str:
    return succeed(os.listdir("/root"))


def list_programs(_: Facts) -> str:
    return succeed(os.listdir("/usr/bin"))


def write_usr(_: Facts) -> str:
    return opened("/usr/local/.escape", os.O_WRONLY | os.O_CREAT)


def write_agent(facts: Facts) -> str:
    return opened(facts["agent"], os.O_WRONLY)


def read_by_proc_root(facts: Facts) -> str:
    return opened(f"/proc/self/root{facts['secret']}")


def read_by_proc_cwd(facts: Facts) -> str:
    return opened(f"/proc/self/cwd/../../../../../../../../..{facts['secret']}")


def read_by_symlink(facts: Facts) -> str:
    link = f"{facts['workspace']}/symlink"
    os.symlink(facts["secret"], link)
    return opened(link)


def hard_link_out(facts: Facts) -> str:
    os.link(facts["secret"], f"{facts['workspace']}/hardlink")
    return "OK"


def read_interpreter(facts: Facts) -> str:
    return opened(facts["python"])


def read_environ_of_others(facts: Facts) -> str:
    return opened(f"/proc/{facts['other']}/environ")


def read_memory_of_others(facts: Facts) -> str:
    return opened(f"/proc/{facts['other']}/mem")


def read_own_maps(_: Facts) -> str:
    return opened("/proc/self/maps")


def list_processes(_: Facts) -> str:
    return succeed(os.listdir("/proc"))


def list_sysfs(_: Facts) -> str:
    return succeed(os.listdir("/sys/class/net"))


def write_core_pattern(_: Facts) -> str:
    return opened("/proc/sys/kernel/core_pattern", os.O_RDWR)


def open_kernel_log(_: Facts) -> str:
    return opened("/dev/kmsg")


def open_terminal_maker(_: Facts) -> str:
    return opened("/dev/ptmx", os.O_RDWR)


def open_shared_memory(_: Facts) -> str:
    path = "/dev/shm/escape"
    opened(path, os.O_RDWR | os.O_CREAT)
    os.unlink(path)
    return "OK"


def make_fifo(facts: Facts) -> str:
    os.mkfifo(f"{facts['workspace']}/fifo")
    return "OK"


def make_device(facts: Facts) -> str:
    os.mknod(f"{facts['workspace']}/device", stat.S_IFCHR | 0o600, os.makedev(1, 1))
    return "OK"


def make_setuid_by_chmod(facts: Facts) -> str:
    path = f"{facts['workspace']}/setuid"
    opened(path, os.O_RDWR | os.O_CREAT)
    os.chmod(path, 0o4755)
    return "OK"


def make_setuid_by_open(facts: Facts) -> str:
    return opened(f"{facts['workspace']}/setuid-open", os.O_RDWR | os.O_CREAT, 0o4755)


def make_setgid_by_fchmod(facts: Facts) -> str:
    fd = os.open(f"{facts['workspace']}/setgid", os.O_RDWR | os.O_CREAT, 0o755)
    os.fchmod(fd, 0o2755)
    return "OK"


def set_attribute(facts: Facts) -> str:
    path = f"{facts['workspace']}/attribute"
    opened(path, os.O_RDWR | os.O_CREAT)
    os.setxattr(path, "user.escape", b"x")
    return "OK"


# --- programs ------------------------------------------------------------------------------------


def run_program(_: Facts) -> str:
    return spawn(["/usr/bin/true"])


def run_setuid_program(_: Facts) -> str:
    return spawn(["/usr/bin/su", "--version"])


def write_script(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755)
    os.write(fd, b"#!/bin/true\n")
    os.close(fd)


def run_workspace_script(facts: Facts) -> str:
    path = f"{facts['workspace']}/script"
    write_script(path)
    return spawn([path])


def run_temporary_script(_: Facts) -> str:
    path = f"/tmp/escape-{os.getpid()}"
    write_script(path)
    try:
        return spawn([path])
    finally:
        os.unlink(path)


def map_workspace_code(facts: Facts) -> str:
    path = f"{facts['workspace']}/code"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
    os.write(fd, bytes(4096))
    return succeed(mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))


def map_temporary_code(_: Facts) -> str:
    path = f"/tmp/escape-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
    os.unlink(path)
    os.write(fd, bytes(4096))
    return succeed(mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))


def copy_elf(facts: Facts) -> str:
    """Copy a program that runs: in a cage that allows Python, Python's own file can be read."""
    path = f"{facts['workspace']}/elf"
    with open(facts["python"], "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    os.chmod(path, 0o755)
    return path


def run_elf(facts: Facts) -> str:
    return spawn([copy_elf(facts), "-I", "-S", "-c", "pass"])


def run_elf_by_loader(facts: Facts) -> str:
    return spawn([facts["loader"], copy_elf(facts), "-I", "-S", "-c", "pass"])


def run_other_program_by_loader(facts: Facts) -> str:
    return spawn([facts["loader"], "/usr/bin/true"])


def run_from_memory(_: Facts) -> str:
    fd = call("memfd_create", b"escape", 0)
    os.write(fd, b"#!/bin/true\n")
    return spawn([f"/proc/self/fd/{fd}"])


def run_by_descriptor(_: Facts) -> str:
    fd = os.open("/usr/bin/true", os.O_PATH)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            call("execveat", fd, b"", (ctypes.c_char_p * 2)(b"true", None), None, 0x1000)
        os._exit(ctypes.get_errno() or 255)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "OK" if status == 0 else errno.errorcode[status]


# --- processes and namespaces --------------------------------------------------------------------


def trace(_: Facts) -> str:
    return succeed(call("ptrace", 0, 0, 0, 0))


def read_memory_by_call(_: Facts) -> str:
    target, source = ctypes.create_string_buffer(4), ctypes.create_string_buffer(b"abc")
    local, remote = (struct.pack("QQ", ctypes.addressof(buffer), 4) for buffer in (target, source))
    return succeed(call("process_vm_readv", os.getpid(), local, 1, remote, 1, 0))


def signal_outside(facts: Facts) -> str:
    os.kill(facts["pid"], 0)
    return "OK"


def signal_others(facts: Facts) -> str:
    os.kill(facts["other"], 0)
    return "OK"


def take_descriptor(_: Facts) -> str:
    pidfd = call("pidfd_open", os.getpid(), 0)
    return succeed(call("pidfd_getfd", pidfd, pidfd, 0))


def compare_processes(_: Facts) -> str:
    return succeed(call("kcmp", os.getpid(), os.getpid(), 0, 0, 0))


def new_user_namespace(_: Facts) -> str:
    return succeed(call("unshare", 0x10000000))


def enter_namespace(facts: Facts) -> str:
    fd = os.open(f"/proc/{facts['other']}/ns/uts", os.O_RDONLY)
    return succeed(call("setns", fd, 0))


def enter_namespace_by_pidfd(facts: Facts) -> str:
    return succeed(call("setns", call("pidfd_open", facts["other"], 0), 0x04000000))


def clone_into_namespace(_: Facts) -> str:
    child = call("clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    return succeed(os.waitpid(child, 0))


def clone_by_structure(_: Facts) -> str:
    arguments = struct.pack("8Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    child = call("clone3", arguments, len(arguments))
    if child == 0:
        os._exit(0)
    return succeed(os.waitpid(child, 0))


def mount_file_system(facts: Facts) -> str:
    return succeed(call("mount", b"none", facts["workspace"].encode(), b"tmpfs", 0, None))


def open_file_system(_: Facts) -> str:
    return succeed(call("fsopen", b"tmpfs", 0))


def open_tree(_: Facts) -> str:
    return succeed(call("open_tree", -100, b"/", 0))


def change_root(facts: Facts) -> str:
    return succeed(call("chroot", facts["workspace"].encode()))


def name_host(_: Facts) -> str:
    return succeed(call("sethostname", b"escaped", 7))


def become_root(_: Facts) -> str:
    os.setuid(0)
    return "OK"


def raise_priority(_: Facts) -> str:
    return succeed(os.nice(-5))


def hold_capability(_: Facts) -> str:
    return "OK" if LIBC.prctl(23, 21, 0, 0, 0) == 1 else "NONE"


def raise_limit(_: Facts) -> str:
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NPROC, (most + 1, most + 1))
    except ValueError:
        return "EPERM"
    return "OK"


def dump_core(_: Facts) -> str:
    return "OK" if resource.getrlimit(resource.RLIMIT_CORE)[1] else "NONE"


# --- parts of the kernel that nobody here needs ---------------------------------------------------


def add_key(_: Facts) -> str:
    return succeed(call("add_key", b"user", b"escape", b"x", 1, -2))


def use_io_uring(_: Facts) -> str:
    return succeed(call("io_uring_setup", 1, bytes(120)))


def use_userfaultfd(_: Facts) -> str:
    return succeed(call("userfaultfd", 1))


def use_bpf(_: Facts) -> str:
    return succeed(call("bpf", 0, struct.pack("IIIII", 2, 4, 8, 1, 0) + bytes(100), 120))


def use_perf(_: Facts) -> str:
    attribute = struct.pack("IIQ", 1, 128, 9) + bytes(112)
    return succeed(call("perf_event_open", attribute, 0, -1, -1, 0))


def use_handles(facts: Facts) -> str:
    handle = struct.pack("Ii", 128, 0) + bytes(128)
    return succeed(call("name_to_handle_at", -100, facts["workspace"].encode(), handle, bytes(4), 0))


def change_personality(_: Facts) -> str:
    return succeed(call("personality", 0x40000))


def read_kernel_log(_: Facts) -> str:
    return succeed(call("syslog", 3, ctypes.create_string_buffer(64), 64))


def share_memory(_: Facts) -> str:
    identifier = call("shmget", 0, 4096, 0o1600)
    LIBC.shmctl(identifier, 0, None)
    return "OK"


def make_message_queue(_: Facts) -> str:
    identifier = call("msgget", 0, 0o1600)
    LIBC.msgctl(identifier, 0, None)
    return "OK"


def make_semaphore(_: Facts) -> str:
    identifier = call("semget", 0, 1, 0o1600)
    LIBC.semctl(identifier, 0, 0)
    return "OK"


def watch_file_system(_: Facts) -> str:
    return succeed(call("fanotify_init", 0x200, 0))


def call_as_i386(_: Facts) -> str:
    """Call getpid (20) through int 0x80, whose numbers a filter for 64 bits would misread."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return "OK" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid() else "NONE"


def call_as_x32(_: Facts) -> str:
    """Call getpid by its x32 number; a kernel without x32 answers ENOSYS."""
    return succeed(call_number(0x40000000 + 39))


def type_into_terminal(_: Facts) -> str:
    """Push a character into a terminal's input: an own one where one can be made, else what is on fd 0."""
    fd: int = 0
    with contextlib.suppress(OSError):
        fd = os.openpty()[1]
        os.setsid()
        fcntl.ioctl(fd, 0x540E, 0)
    return succeed(fcntl.ioctl(fd, 0x5412, b"x"))


# --- network -------------------------------------------------------------------------------------


def make_socket(family: int, kind: int, protocol: int = 0) -> Probe:
    return lambda _: succeed(socket.socket(family, kind, protocol).detach())


def connect(family: int, kind: int, fact: str) -> Probe:
    def attempt(facts: Facts) -> str:
        address = facts[fact]
        with socket.socket(family, kind) as sock:
            sock.settimeout(30)
            sock.connect(tuple(address) if isinstance(address, list) else address)
        return "OK"

    return attempt


def send_from_pair(facts: Facts) -> str:
    near, _far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return succeed(near.sendto(b"x", facts["datagram_path"]))


# --- resources -----------------------------------------------------------------------------------


def fork_many(facts: Facts) -> str:
    children = []
    try:
        for _ in range(facts["many"]["processes"]):
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return "OK"


def fill_disk(facts: Facts) -> str:
    paths = [f"{facts['workspace']}/fill-{number}" for number in range(2)]
    try:
        for path in paths:
            with open(path, "wb") as file:
                file.write(bytes(facts["many"]["half_disk"]))
    finally:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return "OK"


def fill_file(facts: Facts) -> str:
    path = f"{facts['workspace']}/fill"
    try:
        with open(path, "wb") as file:
            os.truncate(file.fileno(), facts["many"]["half_disk"] * 2)
    finally:
        os.unlink(path)
    return "OK"


def fill_inodes(facts: Facts) -> str:
    directory = f"{facts['workspace']}/inodes"
    os.mkdir(directory)
    made = []
    try:
        for number in range(facts["many"]["files"]):
            path = f"{directory}/{number}"
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            made.append(path)
    finally:
        for path in made:
            os.unlink(path)
        os.rmdir(directory)
    return "OK"


def fill_memory(facts: Facts) -> str:
    return succeed(mmap.mmap(-1, facts["many"]["memory"]))


def open_many(_: Facts) -> str:
    return succeed([os.open("/dev/null", os.O_RDONLY) for _ in range(300)])


# --- what was left lying about --------------------------------------------------------------------


def find_descriptor(facts: Facts) -> str:
    for fd in range(3, 256):
        if fd in facts["own_fds"]:
            continue
        with contextlib.suppress(OSError):
            os.fstat(fd)
            return "OK"
    return "NONE"


def find_environment(_: Facts) -> str:
    return "OK" if "ESCAPE_SECRET" in os.environ else "NONE"


PROBES: dict[str, Probe] = {
    probe.__name__.replace("_", "-"): probe
    for probe in (
        read_outside,
        read_shadow,
        list_root_home,
        list_programs,
        write_usr,
        write_agent,
        read_by_proc_root,
        read_by_proc_cwd,
        read_by_symlink,
        hard_link_out,
        read_interpreter,
        read_environ_of_others,
        read_memory_of_others,
        read_own_maps,
        list_processes,
        list_sysfs,
        write_core_pattern,
        open_kernel_log,
        open_terminal_maker,
        open_shared_memory,
        make_fifo,
        make_device,
        make_setuid_by_chmod,
        make_setuid_by_open,
        make_setgid_by_fchmod,
        set_attribute,
        run_program,
        run_setuid_program,
        run_workspace_script,
        run_temporary_script,
        map_workspace_code,
        map_temporary_code,
        run_elf,
        run_elf_by_loader,
        run_other_program_by_loader,
        run_from_memory,
        run_by_descriptor,
        trace,
        read_memory_by_call,
        signal_outside,
        signal_others,
        take_descriptor,
        compare_processes,
        new_user_namespace,
        enter_namespace,
        enter_namespace_by_pidfd,
        clone_into_namespace,
        clone_by_structure,
        mount_file_system,
        open_file_system,
        open_tree,
        change_root,
        name_host,
        become_root,
        raise_priority,
        hold_capability,
        raise_limit,
        dump_core,
        add_key,
        use_io_uring,
        use_userfaultfd,
        use_bpf,
        use_perf,
        use_handles,
        change_personality,
        read_kernel_log,
        share_memory,
        make_message_queue,
        make_semaphore,
        watch_file_system,
        call_as_i386,
        call_as_x32,
        type_into_terminal,
        send_from_pair,
        fork_many,
        fill_disk,
        fill_file,
        fill_inodes,
        fill_memory,
        open_many,
        find_descriptor,
        find_environment,
    )
} | {
    "socket-inet": make_socket(socket.AF_INET, socket.SOCK_STREAM),
    "socket-inet-datagram": make_socket(socket.AF_INET, socket.SOCK_DGRAM),
    "socket-inet6": make_socket(socket.AF_INET6, socket.SOCK_STREAM),
    "socket-unix": make_socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "socket-netlink": make_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "socket-packet": make_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "connect-tcp": connect(socket.AF_INET, socket.SOCK_STREAM, "tcp"),
    "connect-udp": connect(socket.AF_INET, socket.SOCK_DGRAM, "tcp"),
    "connect-unix-path": connect(socket.AF_UNIX, socket.SOCK_STREAM, "unix_path"),
    "connect-unix-abstract": connect(socket.AF_UNIX, socket.SOCK_STREAM, "unix_abstract"),
}


def run(names: list[str], facts: Facts) -> dict[str, str]:
    """Try each in a process of its own and return what came of it, by name."""
    return {name: run_one(PROBES[name], facts) for name in names}


def run_one(probe: Probe, facts: Facts) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        facts = {**facts, "own_fds": (*facts.get("own_fds", ()), reader, writer)}
        try:
            found = probe(facts)
        except OSError as exc:
            found = errno.errorcode.get(exc.errno or 0, str(exc))
        except BaseException as exc:
            found = repr(exc)
        os.write(writer, found.encode()[:4000])
        os._exit(0)
    os.close(writer)
    found = os.read(reader, 4096).decode()
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return found if status == 0 else signal.Signals(-status).name if status < 0 else f"EXIT{status}"
