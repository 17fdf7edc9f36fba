"""A gateway as a child process: `trustlog-client gateway` at free ports."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.cluster import environment

READY_S = 30.0


class GatewayProcess(contextlib.AbstractContextManager):
    """Listens for both protocols; `resp` and `http` are the ports."""

    def __init__(self, directory: Path, deadline_s: float = 20.0, *options: str, plain: bool = False) -> None:
        self.log = directory / "gateway.stderr"
        command = [sys.executable, "-m", "client.cli.main", "-c", str(directory), "--deadline", str(deadline_s)]
        command += ["gateway", "--resp", "127.0.0.1:0", "--http", "127.0.0.1:0", "-o", "json", *options]
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=environment()
            )
        line = self.process.stdout.readline()
        if not line:
            self.stop()
        assert line, self.log.read_text()
        if plain:
            # The banner for people, to its last line.
            lines = [line]
            while lines[-1] != b"Ctrl-C ends it.\n":
                lines.append(self.process.stdout.readline())
                assert lines[-1], self.log.read_text()
            self.banner = b"".join(lines).decode()
            return
        self.banner = json.loads(line)
        self.resp, self.http = (int(self.banner[name].rpartition(":")[2]) for name in ("resp", "http"))

    def stop(self) -> int:
        """End it with SIGTERM and return its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=READY_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(timeout=READY_S)
        finally:
            self.process.stdout.close()

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def __exit__(self, kind, error, traceback) -> None:
        began = time.monotonic()
        status = self.stop()
        if kind is not None:
            print(f"--- gateway (ended with {status} after {time.monotonic() - began:.1f} s)\n{self.log.read_text()}")
