"""Software TPMs for tests: one swtpm process each, with its own state folder and Unix socket, ended by its pid."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from trustlog.tpm.client import Tpm

TOOLS = ("swtpm", "swtpm_setup", "tpm2_checkquote")


def require_tools(*tools: str) -> None:
    """Skip loudly if a tool is missing; with REQUIRE_TOOLS=1, as in CI, fail."""
    missing = [tool for tool in tools or TOOLS if shutil.which(tool) is None]
    if missing:
        text = f"{', '.join(missing)} not found: apt-get install swtpm swtpm-tools tpm2-tools"
        if os.environ.get("REQUIRE_TOOLS") == "1":
            pytest.fail(text)
        pytest.skip(text)


class SoftwareTpm:
    """A machine's TPM: `start` is power on (with the firmware's Startup), `cut_power` and `shut_down` are its ends."""

    def __init__(self, state: Path, sockets: Path) -> None:
        self.state = state
        self._socket = sockets / "tpm"
        self._control = sockets / "ctrl"
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Tpm] = []

    @property
    def address(self) -> str:
        return str(self._socket)

    def start(self, *, resume: bool = False) -> None:
        """Switch the machine on."""
        self._socket.unlink(missing_ok=True)
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state}"]
        command += ["--server", f"type=unixio,path={self._socket}", "--ctrl", f"type=unixio,path={self._control}"]
        command += ["--flags", f"not-need-init,startup-{'state' if resume else 'clear'}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(self._is_up, "the software TPM to listen")

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            raise AssertionError(f"swtpm ended: {self._process.stdout.read()!r}")
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._socket)) == 0

    def cut_power(self) -> None:
        """End it as a power cut does."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def shut_down(self, *, clear: bool = True) -> None:
        """End it as an operating system does."""
        with self.connect() as tpm:
            tpm.shutdown(clear=clear)
        self.cut_power()

    def reboot(self) -> None:
        """Switch it off and on."""
        self.shut_down()
        self.start()

    def connect(self) -> Tpm:
        """Connect to it; whoever forgets to hang up is helped at the next power cut."""
        connection = Tpm.open(self.address, timeout_s=20)
        self._connections.append(connection)
        return connection


@contextmanager
def software_tpm(state: Path) -> Iterator[SoftwareTpm]:
    """A running software TPM whose state lies in `state`."""
    require_tools()
    state.mkdir(exist_ok=True)
    # A Unix socket's path has at most 107 bytes; a test's own folder may be deeper.
    sockets = Path(tempfile.mkdtemp(prefix="swtpm-"))
    tpm = SoftwareTpm(state, sockets)
    try:
        tpm.start()
        yield tpm
    finally:
        tpm.cut_power()
        shutil.rmtree(sockets)


def manufacture(state: Path, authority: Path) -> None:
    """Make a TPM whose endorsement certificate is signed by an authority of our own, which `authority` keeps."""
    require_tools()
    state.mkdir(exist_ok=True)
    authority.mkdir(exist_ok=True)
    lines = {
        "swtpm-localca.conf": [
            f"statedir = {authority}",
            f"signingkey = {authority / 'signkey.pem'}",
            f"issuercert = {authority / 'issuercert.pem'}",
            f"certserial = {authority / 'certserial'}",
        ],
        "swtpm-localca.options": ["--platform-manufacturer Test", "--platform-version 1", "--platform-model Test"],
        "swtpm_setup.conf": [
            f"create_certs_tool = {shutil.which('swtpm_localca')}",
            f"create_certs_tool_config = {authority / 'swtpm-localca.conf'}",
            f"create_certs_tool_options = {authority / 'swtpm-localca.options'}",
            "active_pcr_banks = sha256",
        ],
    }
    for name, content in lines.items():
        (authority / name).write_text("\n".join(content) + "\n")
    command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--config", str(authority / "swtpm_setup.conf")]
    done = subprocess.run([*command, "--create-ek-cert"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
