"""A container engine of the tests' own: dockerd in namespaces of its own, with its own data, socket and networks.

Everything that it starts and mounts lives in those namespaces. When their first process ends, so does all of it: nothing of the
engine, its containers, bridges or mounts is left, however a test ends.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.spaces import Spaces
from tests.support.tools import required, tool
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
# What takes long to make is kept here, which git does not see and `make clean` removes.
KEPT = ROOT / "build" / "containers"
SUITE = "bookworm"
STORAGE = "overlay2"
PYTHON = ("python3", "python3-venv")
BASE, IMAGE = "trustlog-base:test", "trustlog:latest"
LOCKS = ("runtime", "tracing", "build")
CGROUPS = Path("/sys/fs/cgroup")


class Engine(contextlib.AbstractContextManager):
    """A running dockerd; `directory` holds all its files and is removed with it."""

    def __init__(self) -> None:
        self.programs = {name: tool(name) for name in ("dockerd", "docker", "docker-compose")}
        # Short: a socket's path has at most 107 bytes.
        self.directory = here = Path(tempfile.mkdtemp(prefix="trustlog-engine-"))
        self.group = f"/{here.name}"
        self.host = f"unix://{here}/docker.sock"
        (here / "config.json").write_text("{}")
        start = (
            f"exec {self.programs['dockerd']} --config-file {here}/config.json "
            f"--data-root {here}/data --exec-root {here}/exec --pidfile {here}/docker.pid --host {self.host} "
            f"--storage-driver {STORAGE} --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent {self.group}"
        )
        try:
            self._spaces = Spaces(start, here / "dockerd.log")
        except BaseException:
            shutil.rmtree(here)
            raise

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("DOCKER_", "COMPOSE_", "TRUSTLOG"))
        }
        return kept | {"DOCKER_HOST": self.host}

    def __enter__(self):
        try:
            self._spaces.__enter__()
            wait_for(
                lambda: self._spaces.has_ended or self.docker("version", check=False).returncode == 0,
                "dockerd answers",
                60,
            )
            if self._spaces.has_ended:
                required(f"dockerd does not run here: {self._spaces.log.read_text()[-1500:]}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        # Given the time, dockerd ends its containers; the rest goes with the namespaces.
        self._spaces.stop(patience_s=30)
        wait_for(self._groups_removed, "the engine's control groups are empty", 20)
        shutil.rmtree(self.directory)

    def _groups_removed(self) -> bool:
        for top in CGROUPS.glob(f"*{self.group}"):
            for group in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()
            with contextlib.suppress(OSError):
                top.rmdir()
        return not list(CGROUPS.glob(f"*{self.group}"))

    def docker(self, *arguments: str, check=True, seconds=60, **options) -> subprocess.CompletedProcess:
        return self._run("docker", *arguments, check=check, seconds=seconds, **options)

    def _run(self, program: str, *arguments: str, check=True, seconds=60, **options) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "env": self.environment} | options
        done = subprocess.run([self.programs[program], *arguments], timeout=seconds, check=False, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done

    def compose(self, file: Path, *arguments: str, check=True, seconds=300, **variables) -> subprocess.CompletedProcess:
        words = ("--no-ansi", "--file", str(file), "--project-name", "trustlog", *arguments)
        return self._run("docker-compose", *words, check=check, seconds=seconds, env=self.environment | variables)

    def kill(self, container: str) -> None:
        """End a container's first process as the kernel would, which the engine has not asked for."""
        pid = self.docker("inspect", "--format", "{{.State.Pid}}", container).stdout.strip()
        assert int(pid) > 1
        self._spaces.run("kill", "-KILL", pid)


def base_image(engine: Engine, name: str = BASE, packages: tuple[str, ...] = PYTHON) -> None:
    """Make an image with these packages, which no registry is asked for: Debian with Python, about 80 s when it is not kept."""
    archive = KEPT / f"{'-'.join((SUITE, *packages))}.tar"
    if not archive.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="base-", dir=KEPT) as place:
            folder = Path(place, "root")
            command = [tool("debootstrap"), "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(folder)]
            # In a mount namespace: what it mounts while it works is gone in any case.
            done = subprocess.run(
                ["unshare", "--mount", *command], capture_output=True, text=True, timeout=900, check=False
            )
            if done.returncode != 0:
                required(f"debootstrap made no base image: {done.stdout[-500:]}{done.stderr[-500:]}")
            packed = Path(place, "packed.tar")
            exclude = ["--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*"]
            subprocess.run(["tar", "-C", folder, *exclude, "-cf", packed, "."], check=True, timeout=300)
            packed.rename(archive)
    engine.docker("import", str(archive), name, seconds=300)


def build_context(directory: Path) -> Path:
    """Copy what git knows and the image needs, put the locked wheels in, and return the compose file in there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("trustlog/", "replica/", "client/", "deploy/")) or "/" not in name:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    wheels, locks = KEPT / "wheels", ROOT / "deploy" / "docker"
    wanted = "".join((locks / f"{name}.lock").read_text() for name in LOCKS)
    mark = wheels / "locks"
    if not mark.exists() or mark.read_text() != wanted:
        shutil.rmtree(wheels, ignore_errors=True)
        page = (locks / "wheelhouse" / "README.md").read_text()
        (line,) = re.findall(r"^    python3 (-m pip download .*) -d deploy/docker/wheelhouse$", page, re.MULTILINE)
        # As that page says it, for both images and to where they are kept.
        words = [*shlex.split(line), "-r", "deploy/docker/tracing.lock", "--quiet", "-d", str(wheels)]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode != 0:
            pytest.fail(f"the locked wheels cannot be fetched: {done.stderr[-1500:]}")
        mark.write_text(wanted)
    for wheel in wheels.glob("*.whl"):
        shutil.copy2(wheel, directory / "deploy" / "docker" / "wheelhouse")
    return directory / "deploy" / "docker" / "docker-compose.yml"


def build_image(engine: Engine, directory: Path, tag: str = IMAGE, **more: str) -> None:
    """Make an image as deploy/README.md says, with the base and the wheels of the tests. more: further build arguments."""
    base_image(engine)
    build_context(directory)
    given = {"BASE": BASE, "PIP_NO_INDEX": "1"} | more
    arguments = [word for name, value in given.items() for word in ("--build-arg", f"{name}={value}")]
    file = f"{directory}/deploy/docker/Dockerfile"
    engine.docker("build", "--file", file, "--tag", tag, *arguments, str(directory), seconds=600)
