"""What operators ask of status reports: what a replica says of itself, read by `replica.wire.reports`."""

from typing import Any, Final

from replica.wire import reports

REPORT_BYTES_MAX: Final = 256 * 1024
TEXT_MAX: Final = 500


def read_report(raw: bytes) -> dict[str, Any]:
    """Return a report's content, clean; an empty one if it is not a JSON object of moderate size."""
    return reports.read_report(raw, bytes_max=REPORT_BYTES_MAX, text_max=TEXT_MAX)


def text(report: dict[str, Any], *path: str) -> str | None:
    """Return a text of a report, None if there is none at this path."""
    value = reports.value_at(report, *path)
    return value if isinstance(value, str) else None


def median_ms(report: dict[str, Any], what: str) -> float | None:
    """Return the median of a recent latency ("fsync", "attest", "client"), None if the report has none."""
    value = reports.value_at(report, "latency_ms", what, "median")
    return float(value) if type(value) in {int, float} else None


def doubts(report: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Return number, verdict and reason for every log that the replica does not trust."""
    verdicts = report.get("verdicts")
    return [
        (reports.number(one, "replica") or 0, text(one, "verdict") or "-", text(one, "reason") or "-")
        for one in (verdicts if isinstance(verdicts, list) else [])
        if isinstance(one, dict) and one.get("verdict") != "trusted"
    ]
