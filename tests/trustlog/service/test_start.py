"""How the service's program is started: with the standard library, trustlog and `cryptography`, and nothing else's code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trustlog
from trustlog import BackendKind, measurement, service
from trustlog.cli import main as cli

PACKAGE = Path(trustlog.__file__).parent
OWN = {"trustlog", "cryptography"}
# Compiled into `cryptography`, the library that its OpenSSL is bound with, and the line that starts the program.
PARTS = {"_openssl", "_cffi_backend", "__main__"}


def place_of(name: str) -> Path:
    origin = importlib.util.find_spec(name).origin
    assert origin is not None
    path = Path(origin)
    return path.parent if path.name == "__init__.py" else path


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture(scope="module")
def infected(tmp_path_factory):
    """A virtual environment with an editable install of trustlog, and a .pth file and a sitecustomize with code."""
    folder = tmp_path_factory.mktemp("infected environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python3*/site-packages")
    for name in ("cryptography", "_cffi_backend"):
        (site / place_of(name).name).symlink_to(place_of(name))
    (site / "editable.pth").write_text(f"{PACKAGE.parent}\n")
    (site / "evil.pth").write_text(f"import os; open({str(folder / 'pth')!r}, 'w').close()\n")
    (site / "sitecustomize.py").write_text(f"open({str(folder / 'sitecustomize')!r}, 'w').close()\n")
    return folder


def ran(folder) -> set[str]:
    """What ran since this was asked last."""
    found = {name for name in ("pth", "sitecustomize") if (folder / name).exists()}
    for name in found:
        (folder / name).unlink()
    return found


def command_of(folder) -> list[str]:
    """The command as a program in that environment makes it."""
    code = "from trustlog.service import command; print(*command(), sep='\\n')"
    done = run([folder / "venv" / "bin" / "python", "-c", code], cwd="/")
    assert done.returncode == 0, done.stderr
    assert ran(folder) == {"pth", "sitecustomize"}, "the check can fail"
    return done.stdout.splitlines()


def test_nothing_that_is_installed_beside_it_runs(infected, tmp_path):
    command = command_of(infected)
    options = ["--state", str(tmp_path / "log"), "--socket", str(tmp_path / "run" / "s")]
    options += ["--user", "0:0"] if os.getuid() == 0 else []
    done = run([*command, *options], cwd="/")
    assert "there is no log" in done.stderr
    assert ran(infected) == set()
    # With the switch taken away, both would have run.
    run([word for word in command if word != "-S"] + options, cwd="/")
    assert ran(infected) == {"pth", "sitecustomize"}


def loaded(command) -> dict[str, str]:
    """Every module that is loaded when the program starts, with its file."""
    said = "; print(*(f'{n} {getattr(m, \"__file__\", None)}' for n, m in sys.modules.items()), sep='\\n')"
    assert command[-1].endswith("; sys.exit(main())")
    done = run([*command[:-1], command[-1].removesuffix("; sys.exit(main())") + said], cwd="/")
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("where", ["here", "there"])
def test_only_the_library_and_what_is_measured_is_loaded(infected, where):
    modules = loaded(service.command() if where == "here" else command_of(infected))
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - PARTS == OWN
    files = [path for name, path in modules.items() if name.split(".")[0] == "trustlog"]
    names = {f"trustlog/{Path(path).relative_to(PACKAGE).as_posix()}" for path in files}
    measured = {line.split("  ")[1] for line in measurement.manifest(BackendKind.PROCESS).decode().splitlines()[3:]}
    assert names <= measured
    assert "trustlog/service/__main__.py" in names


def test_the_folders_are_absolute_and_come_after_the_standard_library():
    command = service.command()
    done = run(
        [*command[:-1], command[-1].split(";")[0] + ";" + command[-1].split(";")[1] + "; print(*sys.path, sep='\\n')"]
    )
    paths = done.stdout.splitlines()
    own = {str(PACKAGE.parent), str(place_of("cryptography").parent)}
    assert set(paths[-len(own) :]) == own
    assert all(Path(path).is_absolute() for path in paths)
    assert not any("site-packages" in path or "dist-packages" in path for path in paths[: -len(own)])


def test_the_command_line_starts_it_so(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: started.append((path, command, environment)))
    with pytest.raises(SystemExit):
        cli.cli(["serve", "--socket", "s", "--state", "log", "--user", str(os.getuid())])
    ((path, command, environment),) = started
    assert path == sys.executable
    assert command[:5] == service.command()
    assert set(environment) <= {"LD_LIBRARY_PATH", "TZ"}
