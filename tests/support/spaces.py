"""Linux namespaces of a test's own: what is started, mounted and connected in there ends with their first process.

That process dies with the test's (`--pdeathsig`, `--kill-child`), so nothing is left however a test ends. Needs root.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from tests.support.tools import required, tool
from tests.support.waiting import wait_for

PROGRAMS = ("unshare", "setpriv", "nsenter", "ip")


class Spaces(contextlib.AbstractContextManager):
    """Mount, network and process namespaces; `first` is the shell command of their first process, `log` what it says."""

    def __init__(self, first: str, log: Path, environment=None) -> None:
        if os.geteuid() != 0:
            required("namespaces of the test's own need root")
        self._programs = {name: tool(name) for name in PROGRAMS}
        self._first, self._environment, self.log = first, environment, log
        self._process: subprocess.Popen | None = None

    def __enter__(self):
        spaces = ["--mount", "--net", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        command = [self._programs["setpriv"], "--pdeathsig", "KILL", self._programs["unshare"], *spaces]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "sh", "-c", f"ip link set lo up && {self._first}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        try:
            wait_for(lambda: self.has_ended or self._first_pid(), "the namespaces are there", 20)
        except BaseException:
            self.stop()
            raise
        if self.has_ended:
            required(f"no namespaces can be made here: {self.log.read_text()[-500:]}")
        return self

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _first_pid(self) -> str:
        """Return the first process, as it is known out here; "" if there is none yet."""
        pid = 0 if self._process is None else self._process.pid
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() != "unshare":
                    return child
        return ""

    def inside(self, *command: str) -> list[str]:
        """Return a command that runs `command` among these processes, mounts and networks."""
        first = self._first_pid()
        assert first, f"the namespaces' first process has ended: {self.log.read_text()[-1000:]}"
        return [self._programs["nsenter"], "--target", first, "--pid", "--mount", "--net", *command]

    def run(self, *command: str, check=True, seconds=60, **options) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True} | options
        done = subprocess.run(self.inside(*command), timeout=seconds, check=False, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done

    def stop(self, patience_s: float = 0) -> None:
        """End everything in there; the first process is asked first if there is patience."""
        process = self._process
        if process is None:
            return
        if process.poll() is None and patience_s:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("kill", "-TERM", "1", check=False, seconds=10)
                process.wait(patience_s)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(20)
        self._process = None

    def __exit__(self, *_) -> None:
        self.stop()
