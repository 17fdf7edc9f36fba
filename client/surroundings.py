"""Where a measurement was made: without it a figure means little."""

import os
import platform
import ssl
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("trustlog", "cryptography", "msgpack", "uvloop")
# Writing to these is no durability.
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


def describe() -> dict[str, Any]:
    """Return the machine, its load, and the versions of what runs."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "packages": {name: _version_of(name) for name in _PACKAGES},
    }


def file_system_of(directory: Path) -> str:
    """Return the type of the file system that holds `directory`; "unknown" if it cannot be told."""
    best, kind = "", "unknown"
    place = str(directory.resolve()) + "/"
    try:
        mounts = Path("/proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return kind
    for line in mounts:
        fields = line.split(" ")
        point = fields[1].rstrip("/") + "/"
        if place.startswith(point) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
