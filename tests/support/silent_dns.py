"""A name server that hears every question and answers none; python -m, within namespaces of its own.

    python tests/support/silent_dns.py FILE COMMAND …

Runs the command, and appends a byte to FILE for each question.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the child is ended, too
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        server.settimeout(0.1)
        child = subprocess.Popen(sys.argv[2:])
        try:
            with Path(sys.argv[1]).open("ab", buffering=0) as heard:
                while child.poll() is None:
                    try:
                        server.recv(512)
                    except TimeoutError:
                        continue
                    heard.write(b".")
        finally:
            child.terminate()
            child.wait()
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
