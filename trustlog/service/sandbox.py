"""Giving up what the service never needs, before its first request.

1. As root: all groups, then the user ids, for ever.
2. No new privileges, no core dumps, and a process that others of its own user can neither trace nor read
   (PR_SET_DUMPABLE 0: /proc/PID/mem belongs to root then).
3. System calls: a filter (seccomp BPF, assembled here) lets through what an opened log needs, files, time,
   randomness, memory and the sockets that exist, and answers EPERM to the rest: no new socket or connection, no
   program, no process or thread, no signal to others, no tracing, no memory that is both written and run.

The filter knows x86-64 and AArch64. Elsewhere, and where the kernel has no seccomp, step 3 is left out and the
service says so in its WELCOME; the unit file in deploy/systemd has its own filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct

from trustlog.errors import MisuseError
from trustlog.service.protocol import Protection

_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH

# Name: number on x86-64, number on AArch64 (None: it does not exist there).
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, None),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "exit": (60, 93),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "getcwd": (79, 17),
    "rename": (82, None),
    "unlink": (87, None),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "ppoll": (271, 73),
    "accept4": (288, 242),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "statx": (332, 291),
}
# Allowed without PROT_EXEC in the third argument.
_MEMORY = {"mmap": (9, 222), "mprotect": (10, 226)}
# Allowed for these commands in the second argument. FIONBIO makes a socket wait or not, F_GETFD and F_GETFL only ask.
# Others send signals: F_SETOWN, F_SETSIG and F_SETFL with O_ASYNC together kill a process of the same user.
_COMMANDS = {"ioctl": ((16, 29), (0x5421,)), "fcntl": ((72, 25), (1, 3))}
_PROT_EXEC = 4

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_RETURN_ALLOW, _RETURN_ERRNO, _RETURN_KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def become(uid: int, gid: int) -> None:
    """Give up root for ``uid`` and ``gid``; MisuseError if anything of it could be taken back."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid) or os.getgroups():
        raise MisuseError(f"could not become user {uid}: the ids are {os.getresuid()}, {os.getresgid()}")
    if uid == 0:
        return
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise MisuseError("root could be taken back after it was given up")


def hide_memory() -> Protection:
    """Step 2, which must come after ``become`` (the kernel resets it there). Returns what succeeded."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    done = Protection(0)
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1) == 0:
        done |= Protection.NO_NEW_PRIVILEGES
    if _prctl(_PR_SET_DUMPABLE, 0) == 0:
        done |= Protection.NO_DUMP
    return done


def filter_system_calls() -> Protection:
    """Step 3, when everything is imported and opened. Returns SYSTEM_CALLS, or nothing where it cannot be had."""
    column, audit = _MACHINES.get(platform.machine(), (0, 0))
    if not audit:
        return Protection(0)
    program = ctypes.create_string_buffer(assemble(column, audit))
    header = struct.pack("HxxxxxxP", (len(program) - 1) // 8, ctypes.addressof(program))
    buffer = ctypes.create_string_buffer(header, len(header))
    if _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(buffer)) != 0:
        return Protection(0)
    return Protection.SYSTEM_CALLS


def assemble(column: int, audit: int) -> bytes:
    """Return the filter for one architecture: struct sock_filter (code u16, jt u8, jf u8, k u32) after another."""
    refuse = _RETURN_ERRNO | errno.EPERM
    program = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_EQUAL, audit, 1, 0),
        _step(_RETURN, _RETURN_KILL),
        _step(_LOAD, _NUMBER_AT),
    ]
    for numbers in _MEMORY.values():
        program += [
            _step(_EQUAL, numbers[column], 0, 4),
            _step(_LOAD, _ARGUMENTS_AT + 2 * 8),
            _step(_ANY_BIT, _PROT_EXEC, 0, 1),
            _step(_RETURN, refuse),
            _step(_RETURN, _RETURN_ALLOW),
        ]
    for numbers, commands in _COMMANDS.values():
        # The kernel reads 32 bits of a command, as the filter does.
        program += [
            _step(_EQUAL, numbers[column], 0, 3 + len(commands)),
            _step(_LOAD, _ARGUMENTS_AT + 8),
            *(_step(_EQUAL, command, len(commands) - at, 0) for at, command in enumerate(commands)),
            _step(_RETURN, refuse),
            _step(_RETURN, _RETURN_ALLOW),
        ]
    for columns in ALLOWED.values():
        number = columns[column]
        if number is not None:
            program += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _RETURN_ALLOW)]
    return b"".join([*program, _step(_RETURN, refuse)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _prctl(option: int, first: int, second: int = 0) -> int:
    number = ctypes.c_ulong
    return int(ctypes.CDLL(None, use_errno=True).prctl(option, number(first), number(second), number(0), number(0)))
