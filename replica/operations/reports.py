"""Reading status reports: what a replica says of itself, which may be anything.

Sizes and types are checked and texts made printable here, so that what is shown, counted or archived can be trusted to
be harmless; not to be true.
"""

import json
import math
from typing import Any, Final

from replica.cluster.strict_toml import printable

REPORT_BYTES_MAX: Final = 256 * 1024
DEPTH_MAX: Final = 8
TEXT_MAX: Final = 500


def read_report(raw: bytes) -> dict[str, Any]:
    """Return a report's content, clean; an empty one if it is not a JSON object of moderate size."""
    if len(raw) > REPORT_BYTES_MAX:
        return {}
    try:
        report = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return _clean(report, DEPTH_MAX) if isinstance(report, dict) else {}


def number(report: dict[str, Any], *path: str) -> int | None:
    """Return a natural number of a report, None if there is none at this path."""
    value = _at(report, path)
    return value if type(value) is int and 0 <= value < 1 << 64 else None


def text(report: dict[str, Any], *path: str) -> str | None:
    """Return a text of a report, None if there is none at this path."""
    value = _at(report, path)
    return value if isinstance(value, str) else None


def median_ms(report: dict[str, Any], what: str) -> float | None:
    """Return the median of a recent latency ("fsync", "attest", "client"), None if the report has none."""
    value = _at(report, ("latency_ms", what, "median"))
    return float(value) if type(value) in {int, float} else None


def doubts(report: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Return number, verdict and reason for every log that the replica does not trust."""
    verdicts = report.get("verdicts")
    return [
        (number(one, "replica") or 0, text(one, "verdict") or "-", text(one, "reason") or "-")
        for one in (verdicts if isinstance(verdicts, list) else [])
        if isinstance(one, dict) and one.get("verdict") != "trusted"
    ]


def _at(report: dict[str, Any], path: tuple[str, ...]) -> Any:  # noqa: ANN401 - JSON
    value: Any = report
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _clean(value: Any, depth: int) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, str):
        return printable(value, TEXT_MAX)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict | list) and depth == 0:
        return "…"
    if isinstance(value, dict):
        return {printable(key): _clean(content, depth - 1) for key, content in value.items()}
    if isinstance(value, list):
        return [_clean(content, depth - 1) for content in value]
    return value
