"""What the sandbox lets through and what not, each tried in a process of its own that put it on."""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trustlog.service.support import IS_ROOT, LOG_UID, as_root
from trustlog.service import sandbox
from trustlog.service.protocol import Protection

ROOT = Path(__file__).parents[3]
ERRNO_EPERM = 0x00050001

SCRIPT = """
import ctypes, errno, fcntl, mmap, os, signal, socket, subprocess, sys, threading
from trustlog.service import sandbox
one, other = socket.socketpair()
libc = ctypes.CDLL(None, use_errno=True)
done = sandbox.hide_memory()
if {filtered}:
    done |= sandbox.filter_system_calls()
    if not done & 4:
        print("unavailable")
        sys.exit()

def attempt(name, action):
    try:
        action()
    except (OSError, RuntimeError) as error:
        print(name, "refused", getattr(error, "errno", None) in (errno.EPERM, None))
    else:
        print(name, "done")

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()

def protect():
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), 5) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")

attempt("a new socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close())
attempt("a new unix socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close())
attempt("a process", fork)
attempt("a thread", thread)
attempt("a program", lambda: subprocess.run(["/bin/true"], check=True))
attempt("a signal", lambda: os.kill(os.getppid(), 0))
attempt("an owner of signals", lambda: fcntl.fcntl(one, fcntl.F_SETOWN, os.getpid()))
attempt("a signal of one's choice", lambda: fcntl.fcntl(one, 10, signal.SIGWINCH))
attempt("signals when something comes", lambda: fcntl.fcntl(one, fcntl.F_SETFL, os.O_RDWR | os.O_ASYNC))
attempt("memory to run", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC))
attempt("memory made to run", protect)
attempt("an owner", lambda: os.chown("/proc/self", -1, -1))
attempt("another user", lambda: os.setuid(os.getuid()))

attempt("+ the sockets there are", lambda: (one.sendall(b"x"), other.settimeout(1), other.recv(1)))
attempt("+ how a descriptor is kept", lambda: fcntl.fcntl(one, fcntl.F_GETFD))
attempt("+ a file", lambda: open("file", "w").close())
attempt("+ renamed", lambda: os.rename("file", "other"))
attempt("+ synced", lambda: os.fsync(os.open(".", os.O_RDONLY)))
attempt("+ removed", lambda: os.unlink("other"))
attempt("+ randomness", lambda: os.urandom(8))
attempt("+ memory", lambda: mmap.mmap(-1, 1 << 20).close())
"""


def run(filtered, cwd):
    code = SCRIPT.format(filtered=filtered)
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    if done.stdout == "unavailable\n":
        pytest.skip("this kernel or machine has no filter of system calls")
    return done.stdout.splitlines()


def test_the_filter_lets_through_what_a_log_needs_and_no_more(tmp_path):
    lines = run(filtered=True, cwd=tmp_path)
    assert len(lines) == 21
    for line in lines:
        assert line.endswith("done" if line.startswith("+") else "refused True"), line


def test_without_it_everything_is_possible(tmp_path):
    """The test above can fail."""
    assert {line.rsplit(" ", 1)[1] for line in run(filtered=False, cwd=tmp_path)} == {"done"}


def decide(program, number, arguments=(), audit=0xC000003E):
    """Interpret the filter as the kernel does: struct seccomp_data is nr, arch, address, six arguments."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, audit, 0, *padded)
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        code, if_true, if_false, k = steps[at]
        at += 1
        match code:
            case 0x20:
                value = struct.unpack_from("<I", data, k)[0]
            case 0x15:
                at += if_true if value == k else if_false
            case 0x45:
                at += if_true if value & k else if_false
            case 0x06:
                return k
            case _:
                raise AssertionError(code)


def allows(program, number, command, audit):
    verdict = decide(program, number, (3, command), audit)
    assert verdict in {sandbox._RETURN_ALLOW, ERRNO_EPERM}
    return verdict == sandbox._RETURN_ALLOW


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filters_decisions(machine, column):
    index, audit = sandbox._MACHINES[machine]
    assert index == column
    program = sandbox.assemble(column, audit)
    assert len(program) % 8 == 0
    allowed = {numbers[column] for numbers in sandbox.ALLOWED.values()} - {None}
    ioctl, fcntl = (16, 72) if column == 0 else (29, 25)
    checked = {numbers[column] for numbers in sandbox._MEMORY.values()} | {ioctl, fcntl}
    for number in range(512):
        if number not in checked:
            expected = sandbox._RETURN_ALLOW if number in allowed else ERRNO_EPERM
            assert decide(program, number, audit=audit) == expected, number
    for number in (numbers[column] for numbers in sandbox._MEMORY.values()):
        assert decide(program, number, (0, 4096, 3), audit) == sandbox._RETURN_ALLOW
        assert decide(program, number, (0, 4096, 7), audit) == ERRNO_EPERM
    ioctls = {command for command in range(0x5400, 0x5500) if allows(program, ioctl, command, audit)}
    assert ioctls == {0x5421}, "FIONBIO, and no typing into a terminal (0x5412)"
    # F_SETFL 4, F_SETOWN 8, F_SETSIG 10, F_SETOWN_EX 15; leases and notices on folders are from 1024 on.
    assert {command for command in range(2048) if allows(program, fcntl, command, audit)} == {1, 3}
    assert decide(program, 0, audit=0x40000003) == sandbox._RETURN_KILL  # the numbers of another architecture
    assert decide(program, 0x40000000, audit=audit) == ERRNO_EPERM  # x32
    for names in (("socket", 41, 198), ("execve", 59, 221), ("ptrace", 101, 117), ("kill", 62, 129)):
        assert decide(program, names[1 + column], audit=audit) == ERRNO_EPERM, names[0]


def test_an_unknown_machine_has_no_filter(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    assert sandbox.filter_system_calls() == Protection(0)


def test_hidden_memory():
    """Asked of the kernel: a process that became another user is not dumpable anyhow, one that was started as it is."""
    code = (
        "import ctypes, resource\nfrom trustlog.service import sandbox\nlibc = ctypes.CDLL(None)\n"
        "print(libc.prctl(3, 0, 0, 0, 0), libc.prctl(39, 0, 0, 0, 0), int(sandbox.hide_memory()))\n"
        "print(libc.prctl(3, 0, 0, 0, 0), libc.prctl(39, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1 0 3\n0 1 (0, 0)\n"


@as_root
def test_root_cannot_be_taken_back():
    code = f"import os; from trustlog.service import sandbox; sandbox.become({LOG_UID}, {LOG_UID}); print(os.getresuid(), os.getresgid(), os.getgroups()); os.setuid(0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"{(LOG_UID,) * 3} {(LOG_UID,) * 3} []\n"
    assert "PermissionError" in done.stderr


@pytest.mark.skipif(IS_ROOT, reason="root becomes anybody")
def test_only_root_becomes_another_user():
    with pytest.raises(PermissionError):
        sandbox.become(LOG_UID, LOG_UID)
