"""A load that knows what it was told, for where only Python is: one file, the standard library, Redis' protocol.

    python counting.py HOST PORT PASSWORD-FILE WORKERS PREFIX

Each worker puts ever new keys and counts a counter of its own up, until standard input ends; all names begin with PREFIX. Every answer is a line on standard
output: "put KEY VALUE", "incr KEY TOTAL", or "unknown put KEY", "unknown incr KEY" when there was none or an error.
"""

import contextlib
import socket
import sys
import threading
from pathlib import Path

ANSWER_S = 60.0


class Redis:
    """A connection that is made anew after an error."""

    def __init__(self, host: str, port: int, password: str) -> None:
        self._place, self._password = (host, port), password
        self._socket: socket.socket | None = None

    def ask(self, *words: str) -> str:
        """Return the one line that answers; OSError for an error, or none."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._place, timeout=ANSWER_S)
                self._file = self._socket.makefile("rb")
                if self._password:
                    self._talk("AUTH", self._password)
            return self._talk(*words)
        except OSError:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
            raise

    def _talk(self, *words: str) -> str:
        parts = [f"*{len(words)}\r\n", *(f"${len(word.encode())}\r\n{word}\r\n" for word in words)]
        self._socket.sendall("".join(parts).encode())
        line = self._file.readline().decode().rstrip()
        if not line or line.startswith("-"):
            raise OSError(line or "the connection ended")
        return line[1:]


def work(worker: str, redis: Redis, ended: threading.Event, told: threading.Lock) -> None:
    def tell(text: str) -> None:
        with told:
            print(text, flush=True)

    number = 0
    while not ended.is_set():
        key, value, counter = f"key-{worker}-{number}", f"value-{worker}-{number}", f"counter-{worker}"
        number += 1
        for verb, words in (("put", ("SET", key, value)), ("incr", ("INCR", counter))):
            try:
                answer = redis.ask(*words)
                tell(f"{verb} {words[1]} {value if verb == 'put' else answer}")
            except OSError as error:
                tell(f"unknown {verb} {words[1]} {error}")
                ended.wait(0.2)


def main(host: str, port: str, password_file: str, workers: str, prefix: str) -> None:
    password = ""
    if password_file != "-":
        password = Path(password_file).read_text(encoding="ascii").splitlines()[0]
    ended, told = threading.Event(), threading.Lock()
    threads = [
        threading.Thread(target=work, args=(f"{prefix}{worker}", Redis(host, int(port), password), ended, told))
        for worker in range(int(workers))
    ]
    for thread in threads:
        thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
