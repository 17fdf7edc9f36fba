"""The measurement is over these files and this interpreter, in this layout, and nothing else."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cryptography
import pytest

import trustlog
from tests.trustlog.support import CONTEXT, NONCE, OTHER_CONTEXT, OTHER_NONCE, identity_of
from trustlog import BackendKind, MisuseError, VerificationError, create, in_memory, measurement, open_log, verify_quote

PACKAGE = Path(trustlog.__file__).parent


@pytest.fixture
def package(tmp_path):
    """A package with a base of two files and one backend each."""
    place = tmp_path / "somewhere" / "trustlog"
    for name in ("service", "tpm", "cli"):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text(f"# {name}\n")
    (place / "b.py").write_text("B = 1\n")
    (place / "a.py").write_text("A = 1\n")
    (place / "notes.md").write_text("not a program\n")
    return place


def by_hand(kind: str, files: dict[str, bytes]) -> bytes:
    text = f"trustlog/measurement 1 {kind}\ninterpreter cpython {platform.python_version()}\n"
    text += f"cryptography {cryptography.__version__}\n"
    text += "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    return text.encode()


@pytest.mark.parametrize(
    ("kind", "folders"),
    [(BackendKind.SOFTWARE, []), (BackendKind.PROCESS, ["service"]), (BackendKind.TPM, ["tpm"])],
)
def test_the_manifest_by_hand(package, kind, folders):
    files = {"trustlog/a.py": b"A = 1\n", "trustlog/b.py": b"B = 1\n"}
    for folder in folders:
        files[f"trustlog/{folder}/__init__.py"] = f"# {folder}\n".encode()
    expected = by_hand(kind.name.lower(), files)
    assert measurement.manifest(kind, package) == expected
    assert measurement.measurement_of(expected) == hashlib.sha256(expected).digest()


def test_where_the_package_lies_does_not_count(package, tmp_path):
    before = measurement.manifest(BackendKind.TPM, package)
    moved = tmp_path / "a place with a space" / "trustlog"
    shutil.copytree(package, moved)
    assert measurement.manifest(BackendKind.TPM, moved) == before


@pytest.mark.parametrize("change", ["byte", "added", "removed", "renamed"])
def test_every_change_of_the_files_is_measured(package, change):
    before = measurement.manifest(BackendKind.PROCESS, package)
    match change:
        case "byte":
            (package / "service" / "__init__.py").write_text("# Service\n")
        case "added":
            (package / "c.py").write_text("")
        case "removed":
            (package / "a.py").unlink()
        case "renamed":
            (package / "a.py").rename(package / "aa.py")
    assert measurement.manifest(BackendKind.PROCESS, package) != before


def test_other_backends_and_the_command_line_do_not_count(package):
    before = measurement.manifest(BackendKind.SOFTWARE, package)
    (package / "service" / "__init__.py").write_text("changed")
    (package / "tpm" / "__init__.py").write_text("changed")
    (package / "cli" / "__init__.py").write_text("changed")
    (package / "notes.md").write_text("changed")
    assert measurement.manifest(BackendKind.SOFTWARE, package) == before


def test_what_cannot_be_measured_is_refused(package, monkeypatch):
    (package / "d.py").symlink_to(package / "nowhere.py")
    with pytest.raises(MisuseError, match=r"d\.py: cannot be measured: No such file"):
        measurement.manifest(BackendKind.SOFTWARE, package)
    (package / "d.py").unlink()
    (package / "d.py").write_bytes(bytes(measurement.FILE_BYTES_MAX + 1))
    with pytest.raises(MisuseError, match="larger than"):
        measurement.manifest(BackendKind.SOFTWARE, package)
    monkeypatch.setattr(measurement, "FILES_MAX", 2)
    with pytest.raises(MisuseError, match="3 source files"):
        measurement.manifest(BackendKind.SOFTWARE, package)


def test_the_real_manifest_is_what_sha256sum_prints():
    text = measurement.manifest(BackendKind.SOFTWARE).decode("ascii")
    lines = [line for line in text.splitlines() if re.match(r"[0-9a-f]{64}  ", line)]
    names = [line.split("  ")[1] for line in lines]
    assert set(names) == {f"trustlog/{path.name}" for path in PACKAGE.glob("*.py")}
    printed = subprocess.run(["sha256sum", *names], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        (BackendKind.SOFTWARE, "trustlog.software"),
        (BackendKind.PROCESS, "trustlog.service.__main__"),
        (BackendKind.TPM, "trustlog.tpm.opening"),
    ],
)
def test_everything_of_ours_that_is_loaded_beside_the_key_is_measured(kind, entry):
    program = f"import sys, {entry}; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('trustlog')), sep='\\n')"
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = {f"trustlog/{Path(path).relative_to(PACKAGE)}" for path in printed.stdout.splitlines()}
    measured = {line.split("  ")[1] for line in measurement.manifest(kind).decode().splitlines()[3:]}
    assert loaded <= measured
    assert len(loaded) > 8


def test_equal_in_every_process():
    program = "from trustlog import measurement as m, BackendKind as k; print(m.own_measurement(k.PROCESS).hex())"
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=PACKAGE.parent,
            env={"PYTHONHASHSEED": seed, "LC_ALL": "C"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {measurement.own_measurement(BackendKind.PROCESS).hex().encode() + b"\n"}


@pytest.mark.parametrize("way", [create, open_log])
def test_measured_before_the_key_is_there(tmp_path, monkeypatch, way):
    create(tmp_path / "log").close()
    monkeypatch.setattr("trustlog.software.own_measurement", _fail)
    with pytest.raises(RuntimeError, match="measured now"):
        way(tmp_path / ("new" if way is create else "log"))
    assert not (tmp_path / "new").exists()


def _fail(kind):
    raise RuntimeError("measured now")


def test_a_log_quotes_its_measurement():
    log = in_memory()
    answer = log.quote(nonce=NONCE, context=CONTEXT)
    said = verify_quote(identity_of(log), answer, context=CONTEXT, nonce=NONCE)
    assert said.measurement == log.measurement == measurement.own_measurement(BackendKind.SOFTWARE)
    assert (said.public_key, said.epoch) == (log.public_key, 0)
    for wrong, reason in (({"nonce": OTHER_NONCE}, "wrong-nonce"), ({"context": OTHER_CONTEXT}, "wrong-context")):
        with pytest.raises(VerificationError) as caught:
            verify_quote(identity_of(log), answer, **({"context": CONTEXT, "nonce": NONCE} | wrong))
        assert caught.value.reason == reason


def test_a_quote_takes_proper_arguments_only():
    log = in_memory()
    for wrong in ({"nonce": b"short", "context": CONTEXT}, {"nonce": NONCE, "context": b"short"}):
        with pytest.raises(MisuseError, match="must be 32 bytes"):
            log.quote(**wrong)
    log.close()
    with pytest.raises(MisuseError, match="closed"):
        log.quote(nonce=NONCE, context=CONTEXT)
