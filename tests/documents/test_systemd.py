"""The units in deploy/systemd: they are valid where systemd can say so, and shut in what they should."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ("trustlog-log@.service", "trustlog-replica@.service")
PROGRAMS = "/opt/trustlog/.venv/bin"


def service(name: str) -> dict[str, list[str]]:
    """The settings of a unit's [Service]; a setting may be given more than once."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    lines = (UNITS / name).read_text().split("[Service]")[1].split("[Install]")[0].splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    assert set(found) == set(parser["Service"])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_both_give_up(name):
    unit = service(name)
    for key in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "MemoryDenyWriteExecute", "RestrictNamespaces"):
        assert unit[key] == ["yes"], key
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["LimitCORE"] == ["0"]
    assert unit["SystemCallFilter"][0] == "@system-service"
    assert "@privileged" in unit["SystemCallFilter"][1]
    assert unit["ExecStart"][0].startswith(f"{PROGRAMS}/trustlog")


def test_the_log_has_no_network_and_another_user_than_the_replica():
    log, replica = map(service, NAMES)
    assert log["PrivateNetwork"] == ["yes"]
    assert log["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert log["User"] != replica["User"]
    assert f"--client-user {replica['User'][0]}" in log["ExecStart"][0]
    assert "PrivateUsers" not in log, "the peer's user id would be lost"
    (folder,) = log["RuntimeDirectory"]
    page = (UNITS / "README.md").read_text()
    assert f"/run/{folder.replace('%i', 'replica-0')}/log.sock" in page
    assert f"/run/{folder}/log.sock" in log["ExecStart"][0]


def test_the_options_that_the_units_use_exist():
    for name, module in zip(NAMES, ("trustlog.cli.main", "replica.cli.main"), strict=True):
        words = service(name)["ExecStart"][0].split()
        done = subprocess.run(
            [sys.executable, "-m", module, words[1], "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        for option in (word for word in words if word.startswith("--")):
            assert option in done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(("name", "exposure_max"), [(NAMES[0], 10), (NAMES[1], 20)])
def test_systemd_finds_them_valid_and_safe(tmp_path, name, exposure_max):
    # Their programs are elsewhere here; everything else stays as it is.
    programs = tmp_path / "bin"
    programs.symlink_to(Path(sys.executable).parent)
    for unit in NAMES:
        text = (UNITS / unit).read_text().replace(PROGRAMS, str(programs))
        (tmp_path / unit).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"./{name}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={exposure_max}", f"./{name}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout[-300:]


DROP_IN = Path("trustlog-replica@.service.d") / "tpm.conf.example"


def test_the_drop_in_opens_the_tpm_and_nothing_else():
    lines = [line for line in (UNITS / DROP_IN).read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["[Service]", "PrivateDevices=no", "DeviceAllow=/dev/tpmrm0 rw", "SupplementaryGroups=tss"]
    assert service(NAMES[1])["DevicePolicy"] == ["closed"]
    assert str(DROP_IN) in (UNITS / "README.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_the_drop_in_valid(tmp_path):
    programs = tmp_path / "bin"
    programs.symlink_to(Path(sys.executable).parent)
    for unit in NAMES:
        (tmp_path / unit).write_text((UNITS / unit).read_text().replace(PROGRAMS, str(programs)))
    (tmp_path / DROP_IN.parent).mkdir()
    (tmp_path / DROP_IN.with_suffix("")).write_text((UNITS / DROP_IN).read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"./{NAMES[1]}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_that_is_never_both_written_and_run_is_enough(tmp_path):
    """What MemoryDenyWriteExecute asks, by the kernel's own means where it has them (Linux 6.3)."""
    work = (
        "import ctypes, pathlib, sys, trustlog, trustlog.service.__main__, replica.shell.daemon\n"
        "with trustlog.create(pathlib.Path(sys.argv[1])) as log:\n"
        "    log.append([bytes(32)], context=bytes(32))\n"
        "print(ctypes.CDLL(None).prctl(66, 0, 0, 0, 0))"
    )
    code = (
        "import ctypes, os, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0: sys.exit(77)\n"
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, work, str(tmp_path / "log")]
    done = subprocess.run(command, cwd=UNITS.parents[1], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel cannot refuse such memory")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
