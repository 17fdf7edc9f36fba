"""A program that has taken a replica over: it runs as the replica's user and tries everything that user can.

Its imports are made first, as whoever started it; then it becomes the user. Prints what came of each attempt as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from pathlib import Path

from trustlog import TrustLogError, entry_digest
from trustlog.service.client import RemoteLog

CONTEXT = bytes(32)
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
libc = ctypes.CDLL(None, use_errno=True)


def attempt(action):
    """Return "done", or the name of what refused it."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno, "OSError")
    except TrustLogError as error:
        return type(error).__name__
    return "done"


def system(call, *arguments):
    if call(*(ctypes.c_ulong(argument) for argument in arguments)) == -1:
        raise OSError(ctypes.get_errno(), "refused")


def read_memory(pid):
    with Path(f"/proc/{pid}/mem").open("rb"):
        pass


def read_remote(pid):
    """process_vm_readv of one byte somewhere: a refusal comes before the address is looked at."""
    vector = (ctypes.c_ulong * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    system(libc.process_vm_readv, pid, ctypes.addressof(vector), 1, ctypes.addressof(vector), 1, 0)


def trace(pid):
    system(libc.ptrace, PTRACE_ATTACH, pid, 0, 0)
    os.waitpid(pid, 0)  # only reached, and needed, where tracing is possible
    system(libc.ptrace, PTRACE_DETACH, pid, 0, 0)


def attempts(path, state, pid):
    log = RemoteLog.connect(path)
    found = {}
    first = log.append([entry_digest(b"one")], context=CONTEXT)
    index = log.last
    found["append"] = first.statement.hex()
    # What a program can send that does not keep to the client's own bookkeeping:
    log._last, log._head, log._first = index - 1, bytes(32), 0
    found["append another at the same index"] = attempt(lambda: log.append([entry_digest(b"two")], context=CONTEXT))
    log._last = index
    found["issued again"] = log.reissue().statement.hex()
    found["second connection"] = attempt(lambda: RemoteLog.connect(path))
    log._low = 0
    found["truncate below"] = attempt(lambda: log.truncate(0, context=CONTEXT))
    for name in ("log.state", "seal.key"):
        found[f"read {name}"] = attempt((state / name).read_bytes)
        found[f"open {name} to write"] = attempt(lambda name=name: (state / name).open("r+b").close())
    found["list the state's folder"] = attempt(lambda: list(state.iterdir()))
    found["put a file into it"] = attempt((state / "log.state.new").touch)
    found["rename it"] = attempt(lambda: state.rename(state.with_name("old")))
    found["put another socket in its place"] = attempt(path.unlink)
    found["read /proc/PID/mem"] = attempt(lambda: read_memory(pid))
    found["read /proc/PID/maps"] = attempt(Path(f"/proc/{pid}/maps").read_bytes)
    found["read its files through /proc"] = attempt(lambda: list(Path(f"/proc/{pid}/fd").iterdir()))
    found["process_vm_readv"] = attempt(lambda: read_remote(pid))
    found["ptrace"] = attempt(lambda: trace(pid))
    found["signal it"] = attempt(lambda: os.kill(pid, signal.SIGWINCH))
    found["last"] = index
    return found


def main():
    path, state, pid, uid = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if os.geteuid() == 0 and uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    print(json.dumps(attempts(path, state, pid)))


if __name__ == "__main__":
    main()
