"""Results as Markdown: tables with ratios, where they were taken, and the places in RESULTS.md that they go to."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click

from client.measure import GENERATOR_BUSY, Level
from client.surroundings import MEMORY_FILE_SYSTEMS, describe, file_system_of
from tests.bench.rounds import Results

RESULTS = Path(__file__).parent / "RESULTS.md"
ROOT = Path(__file__).parents[2]


class MissingPlaceError(Exception):
    """RESULTS.md has no place for these results."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a bar in a cell is escaped."""
    lines = [list(headings), ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rate_and_ratio(level: Level | None, baseline: Level | None) -> str:
    """Return operations per second, and how many times the baseline's that is; a dash if there is no figure."""
    if level is None:
        return "-"
    rate = f"{level.ops_per_second:,.0f}"
    if baseline is None or not baseline.ops_per_second:
        return rate
    return f"{rate} ({ratio(level.ops_per_second / baseline.ops_per_second)})"


def ratio(number: float) -> str:
    """Return a ratio with two significant digits, as far as it is no whole number."""
    return f"{number:.0f}x" if number >= 10 else f"{number:.1f}x" if number >= 1 else f"{number:.2f}x"


def generator_share(level: Level | None) -> str:
    """Return how much of one processor the load generator used; marked if that may have been the limit."""
    if level is None:
        return "-"
    share = f"{level.generator_cpus:.2f}"
    return f"{share} (limit?)" if level.generator_cpus > GENERATOR_BUSY else share


def milliseconds(level: Level | None, field: str) -> str:
    """Return a latency for a table."""
    return "-" if level is None else f"{getattr(level, field):.2f}"


def failures_of(results: Results) -> list[str]:
    """Return what went wrong, a line each and an empty one behind, so that no failure passes as a missing figure."""
    if not results.failures:
        return []
    lines = [f"- failed in {failure.partition(chr(10))[0]}" for failure in results.failures]
    return ["What failed, and so has fewer runs or none:", "", *lines, ""]


def others_of(results: Results) -> str:
    """Return how much of the machine programs outside the measurement used: above a tenth, figures mean little."""
    used = sorted(level.others_cpus for level in results.levels.values())
    if not used:
        return ""
    return f"Programs outside the measurement kept {median(used):.2f} processors busy (median; at most {used[-1]:.2f})."


def files_on(parent: Path | None) -> str:
    """Return the file system in which files are made below `parent`, or where temporary ones are; warn if it is memory."""
    kind = file_system_of(parent or Path(tempfile.gettempdir()))
    if kind in MEMORY_FILE_SYSTEMS:
        click.echo(f"note: the files lie in memory ({kind}), so nothing is durable; name a disk with --dir", err=True)
    return kind


def surroundings(extra: dict[str, str]) -> str:
    """Return where and when in the project's life this was measured, in one paragraph."""
    found = describe()
    load = ", ".join(f"{one:.1f}" for one in found["load_average"])
    parts = [
        f"{found['cpus']} x {found['cpu']}",
        found["system"],
        f"Python {found['python']}",
        found["openssl"],
        f"commit {commit()}",
        f"load average at the end {load}",
        *(f"{name} {value}" for name, value in extra.items()),
    ]
    return "; ".join(parts) + "."


def commit() -> str:
    """Return the commit that was measured, with a mark if the files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or "unknown"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def write_into(path: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks of `name` in a file."""
    begin, end = marks(name)
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise MissingPlaceError(f"{path} has no place for these results: the lines {begin} and {end}")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
