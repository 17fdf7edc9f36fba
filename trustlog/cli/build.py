"""`--version` with what it was built from: enough to tell two programs apart that call themselves alike."""

import hashlib
import json
import platform
import sqlite3
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

import click
import cryptography
from cryptography.hazmat.backends.openssl import backend

import trustlog

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("trustlog", "replica", "client")
Command = TypeVar("Command", bound=Callable[..., Any])


def version_option(command: Command) -> Command:
    """Add `--version`: the program's version, then a line for each part of what it was built from."""

    def show(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if not value or ctx.resilient_parsing:
            return
        click.echo(f"{ctx.find_root().info_name} {trustlog.__version__}")
        for name, text in build_information().items():
            click.echo(f"{name} {text}")
        ctx.exit()

    option = click.option(
        "--version",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show version and build, and exit.",
    )
    return option(command)


def build_information() -> dict[str, str]:
    """Return the commit, a digest of the source files, and the versions of what the program runs on."""
    return {
        "commit": commit() or "unknown",
        "sources": f"sha256:{sources_digest()}",
        "python": f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}",
        "cryptography": f"{cryptography.__version__}, {backend.openssl_version_text()}",
        "sqlite": sqlite3.sqlite_version,
    }


def sources_digest() -> str:
    """Return the SHA-256 over every Python file of the three packages, with its name, in order of the names.

    The same files give the same digest wherever they are installed: two machines that show it run the same program.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            name, content = str(path.relative_to(_ROOT)).encode(), path.read_bytes()
            digest.update(len(name).to_bytes(8, "big") + name + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def commit() -> str | None:
    """Return the commit of the checkout that this runs from, or that it was installed from; None if nobody knows."""
    try:
        if (_ROOT / ".git").exists():
            return _checked_out(_ROOT / ".git")
        said = json.loads(distribution("trustlog").read_text("direct_url.json") or "{}")
        found: str | None = said.get("vcs_info", {}).get("commit_id")
    except (OSError, ValueError, PackageNotFoundError):
        return None
    return found


def _checked_out(git: Path) -> str | None:
    if git.is_file():  # a worktree's: "gitdir: PATH"
        git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    common = git / "commondir"
    for folder in (git, (git / common.read_text().strip()).resolve() if common.exists() else git):
        if (folder / name).exists():
            return (folder / name).read_text().strip()
        packed = folder / "packed-refs"
        for line in packed.read_text().splitlines() if packed.exists() else ():
            if line.endswith(f" {name}"):
                return line.split()[0]
    return None
