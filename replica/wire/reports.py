"""Reading a status report: what a replica says of itself, which may be anything.

Size, types and depth are checked and texts made printable, so that what is shown, counted or archived is harmless; not
so that it is true.
"""

import json
import math
from typing import Any, Final

from replica.cluster.strict_toml import printable

DEPTH_MAX: Final = 8


def read_report(raw: bytes, *, bytes_max: int, text_max: int) -> dict[str, Any]:
    """Return a report's content; an empty one if it is not a JSON object of at most `bytes_max` bytes.

    Texts are cut after `text_max` characters, what lies deeper than `DEPTH_MAX` becomes "…", and a number that JSON
    cannot write (an infinity) null.
    """
    if len(raw) > bytes_max:
        return {}
    try:
        report = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return _clean(report, DEPTH_MAX, text_max) if isinstance(report, dict) else {}


def number(report: dict[str, Any], *path: str) -> int | None:
    """Return a natural number of a report, None if there is none at this path."""
    value = value_at(report, *path)
    return value if type(value) is int and 0 <= value < 1 << 64 else None


def value_at(report: dict[str, Any], *path: str) -> Any:  # noqa: ANN401 - JSON
    """Return what a report holds at this path, None if nothing."""
    value: Any = report
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _clean(value: Any, depth: int, text_max: int) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, str):
        return printable(value, text_max)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict | list) and depth == 0:
        return "…"
    if isinstance(value, dict):
        return {printable(key, text_max): _clean(content, depth - 1, text_max) for key, content in value.items()}
    if isinstance(value, list):
        return [_clean(content, depth - 1, text_max) for content in value]
    return value
