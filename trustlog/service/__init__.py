"""The process backend: the trusted log as a program of its own, reached over a Unix socket.

    protocol   what travels between a log's service and its client, byte by byte
    server     answers requests out of an ``AttestedLog``; part of what must be trusted
    sandbox    gives up what the service never needs: privileges, memory dumps, system calls
    __main__   the program; ``command`` below is how `trustlog serve` and a replica start it
    client     ``RemoteLog``, the verbs of an ``AttestedLog`` at the other end; its word is trusted by nobody

Nothing else of the package imports this one: whoever verifies, or keeps a log in process, needs no sockets.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# What the program imports beside the standard library. The last is what `cryptography` is bound to OpenSSL with.
_IMPORTED = ("trustlog", "cryptography", "_cffi_backend")


def command() -> list[str]:
    """Return the command that starts the program, up to its own options.

    ``-I`` keeps the environment and the working folder out, ``-S`` what is installed: a .pth file in site-packages can
    hold code that every interpreter runs, and so can sitecustomize. So the folders to import from are named here, after
    the standard library's, and their .pth files are not read. What else lies in them is found if it is imported, and
    nothing imports it.
    """
    folders: dict[str, None] = {}  # in order, each once
    for name in _IMPORTED:
        spec = find_spec(name)
        if spec is None or not spec.has_location or spec.origin is None:
            continue  # if it is needed, the program says that it is missing
        origin = Path(spec.origin).absolute()
        folders[str(origin.parent if spec.submodule_search_locations is None else origin.parent.parent)] = None
    start = f"import sys; sys.path += {list(folders)!r}; from trustlog.service.__main__ import main; sys.exit(main())"
    return [sys.executable, "-I", "-S", "-c", start]
