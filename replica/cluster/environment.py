"""Settings from the environment: TRUSTLOG_* variables, which stand above replica.toml and below a command's options.

    TRUSTLOG_CLUSTER_FILE   cluster         TRUSTLOG_LISTEN       listen
    TRUSTLOG_DURABILITY     durability      TRUSTLOG_HTTP         http
    TRUSTLOG_LOG_LEVEL      log_level       TRUSTLOG_RETAIN_MIB   retain_mib
    TRUSTLOG_LOG_FORMAT     log_format

They hold for every command that is given a replica's folder, so that `health` asks where `run` listens. One that is
empty counts as not set. What keeps a log and whose folder it is cannot be changed by a variable.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

from replica.cluster.clusterfile import parse_address
from replica.cluster.strict_toml import Table

Durability = Literal["disk", "memory"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]

PREFIX: Final = "TRUSTLOG_"
RETAIN_MIB_MAX: Final = 1024 * 1024
SOURCE: Final = "environment"
# How alike two names are (difflib's ratio) of which one is a misspelling of the other.
NEAR: Final = 0.75
# Of the other programs and the containers' script, and of no setting.
_OTHERS: Final = ("TRUSTLOG_CLUSTER", "TRUSTLOG_PASSPHRASE_FILE", "TRUSTLOG_PASSPHRASE_SECRET")


def read_address(table: Table, key: str) -> tuple[str, int] | None:
    """Read an optional "host:port"; ConfigError if it is none."""
    text = table.text(key, "")
    if not text:
        return None
    try:
        return parse_address(text)
    except ValueError as error:
        raise table.error(key, str(error)) from None


def _retain(table: Table, key: str) -> int:
    text = table.text(key)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= RETAIN_MIB_MAX):
        raise table.error(key, f"must be a whole number from 0 to {RETAIN_MIB_MAX}")
    return int(text)


# Of each variable the field of `replica.cluster.home.Settings`, and how it is read.
VARIABLES: Final[dict[str, tuple[str, Callable[[Table, str], Any]]]] = {
    "TRUSTLOG_CLUSTER_FILE": ("cluster", lambda table, key: str(Path(table.text(key)).absolute())),
    "TRUSTLOG_DURABILITY": ("durability", lambda table, key: table.choice(key, list(get_args(Durability)))),
    "TRUSTLOG_LOG_LEVEL": ("log_level", lambda table, key: table.choice(key, list(get_args(LogLevel)))),
    "TRUSTLOG_LOG_FORMAT": ("log_format", lambda table, key: table.choice(key, list(get_args(LogFormat)))),
    "TRUSTLOG_LISTEN": ("listen", read_address),
    "TRUSTLOG_HTTP": ("http", read_address),
    "TRUSTLOG_RETAIN_MIB": ("retain_mib", _retain),
}


def settings_of(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that variables give, by field; ConfigError names the variable that cannot be used."""
    given = {name: environ[name] for name in VARIABLES if environ.get(name)}
    table = Table(SOURCE, dict(given))
    return {VARIABLES[name][0]: VARIABLES[name][1](table, name) for name in given}


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the TRUSTLOG_* variables that no program here reads, each with the known name that comes nearest, or "".

    One that comes near a known name is a mistake. Others may be somebody else's: Kubernetes sets such names for every
    service called trustlog.
    """
    known = {name.removeprefix(PREFIX): name for name in (*VARIABLES, *_OTHERS)}
    found = {}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
            near = difflib.get_close_matches(name.removeprefix(PREFIX), list(known), 1, NEAR)
            found[name] = known[near[0]] if near else ""
    return found
