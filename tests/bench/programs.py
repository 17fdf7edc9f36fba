"""Programs that a benchmark starts: each is ended by its process id, and its last words are kept for the error."""

import importlib.util
import json
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"
START_S = 60.0
STOP_S = 10.0
ANSWER_S = 180.0
POLL_S = 0.02
WORDS_SHOWN = 2000


class ProgramError(Exception):
    """A program that a benchmark needs ended, or did not answer; the text says which and shows its last words."""


class Program:
    """A child process that writes its log into `folder`."""

    def __init__(self, name: str, command: list[str], folder: Path, *, talks: bool = False) -> None:
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}.log"
        pipe = subprocess.PIPE if talks else None
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=pipe or subprocess.DEVNULL, stdout=pipe or log, stderr=log, text=talks
            )
        self.pid = self._process.pid

    def check(self) -> None:
        """Raise if it ended."""
        code = self._process.poll()
        if code is not None:
            raise ProgramError(f"{self.name} ended with code {code}: {self.words()}")

    def words(self) -> str:
        return self._log.read_text(errors="replace")[-WORDS_SHOWN:].strip()

    def ask(self, question: dict, seconds: float = ANSWER_S) -> dict:
        """Send one JSON line and return the answer."""
        self.check()
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self.line(seconds))

    def line(self, seconds: float = ANSWER_S) -> str:
        """Return the next line that it prints, without its end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise ProgramError(f"{self.name} did not answer within {seconds:g} s: {self.words()}")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(STOP_S)
            self.check()
        return line.rstrip("\n")

    def stop(self) -> None:
        """End it, gently first."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def module(name: str, *arguments: str) -> list[str]:
    """Return the command of a module of this project."""
    return [sys.executable, "-m", name, *arguments]


def tool_missing(tool: str, package: str) -> str:
    """Say which Debian package is needed; nothing if the tool is there."""
    return "" if shutil.which(tool) else f"apt-get install {package}"


def package_missing(name: str, package: str) -> str:
    """Say which Python package is needed; nothing if it is there."""
    return "" if importlib.util.find_spec(name) else f"pip install {package} (it is in the extra `bench`)"


def wait_for(condition: Callable[[], bool], what: str, programs: list[Program]) -> None:
    """Wait until something is so; ProgramError at the deadline, or when a program ended."""
    ends = time.monotonic() + START_S
    while not condition():
        for program in programs:
            program.check()
        if time.monotonic() > ends:
            raise ProgramError(f"{what} did not come within {START_S:g} s")
        time.sleep(POLL_S)


def fetched(url: str) -> str:
    """Return a page of a program that may not be there yet: then nothing."""
    try:
        with urllib.request.urlopen(url, timeout=2) as page:  # noqa: S310 - http, made here
            return page.read().decode()
    except OSError:
        return ""


def answers_at(port: int) -> bool:
    """Say whether somebody listens."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def first_line(command: list[str]) -> str:
    """Return the first line that a command prints; nothing if there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()
