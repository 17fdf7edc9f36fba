"""`trustlog-replica lab`: the scenarios on a terminal, and the page that draws them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.lab.trace import SEED_MAX
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, output_option

if TYPE_CHECKING:
    from replica.lab.scenarios import Runnable
    from replica.lab.trace import Trace

DEFAULT_PORT = 8400


@click.group(
    "lab",
    short_help="See and attack the protocol, beside systems that do less.",
    epilog=example("trustlog-replica lab list", "trustlog-replica lab serve"),
)
def lab_commands() -> None:
    """See the real protocol in a drawing, and attack it, beside systems that do less.

    Every scenario is a run of the product's core in the simulator, scripted: the same seed gives the same run.
    """


@lab_commands.command("list", short_help="List the scenarios.", epilog=example("trustlog-replica lab list"))
@output_option
def list_command(*, output: Output) -> None:
    """List the scenarios, with the system that each runs and what is expected of it."""
    from replica.lab.scenarios import SCENARIOS  # noqa: PLC0415 - other commands answer sooner without it

    rows = [[s.name, s.system_name, s.title] for s in SCENARIOS.values()]
    data = [
        {"name": s.name, "title": s.title, "system": s.system_name, "expected": s.expected.text, "tells": s.tells}
        for s in SCENARIOS.values()
    ]
    plain = [f"{name}  {title}" for name, _, title in rows]
    output.result({"scenarios": data}, plain, grid(["scenario", "system", "what it shows"], rows))


@lab_commands.command(
    "run",
    short_help="Run a scenario, and print its story.",
    epilog=example("trustlog-replica lab run outcome-only", "trustlog-replica lab run cloned-log --out trace.jsonl"),
)
@click.argument("name")
@click.option("--seed", type=click.IntRange(0, SEED_MAX), default=1, show_default=True, help="Decides all delays.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the trace there, as JSON lines.")
@click.option("--shiviz", "shiviz_path", type=click.Path(path_type=Path), help="Write a log for ShiViz there.")
@output_option
def run_command(*, name: str, seed: int, out: Path | None, shiviz_path: Path | None, output: Output) -> Exit:
    """Run a scenario and print its story as a transcript and a verdict.

    The verdict says what was expected, what happened, and which step decided it. Exit code 1: it did not come as
    expected.
    """
    from replica.lab.shiviz import shiviz  # noqa: PLC0415 - see above

    trace = _scenario(name).run(seed)
    if out is not None:
        out.write_text(trace.json_lines(), encoding="utf-8")
    if shiviz_path is not None:
        shiviz_path.write_text(shiviz(trace), encoding="utf-8")
    _show(output, trace)
    return Exit.OK if trace.verdict["as_expected"] else Exit.NEGATIVE


def _scenario(name: str) -> "Runnable":
    from replica.lab.scenarios import SCENARIOS  # noqa: PLC0415 - see above

    if name not in SCENARIOS:
        raise CommandError(
            f"there is no scenario {name}", "see: trustlog-replica lab list", Exit.USAGE, code="no-scenario"
        )
    return SCENARIOS[name]


def _show(output: Output, trace: "Trace") -> None:
    from replica.lab.trace import transcript  # noqa: PLC0415 - see above

    header, verdict = trace.header, trace.verdict
    number = verdict["decided_by"]
    step = "" if number is None else f"step {number} at {trace.lines[number]['at']} ms: {_step_text(trace, number)}"
    numbers = f"n = {header['n']}, f = {header['f']}, quorum {header['quorum']}, seed {header['seed']}"
    plain = [header["title"], f"{header['system']}: {numbers}", *header["tells"].splitlines(), ""]
    plain += [*transcript(trace), "", f"expected: {verdict['expected']}", f"happened: {verdict['happened']}"]
    plain += [f"decided by: {step or 'nothing'}", f"verdict: {'as' if verdict['as_expected'] else 'NOT as'} expected"]
    data = {"header": header, "verdict": verdict, "decided_by": step, "transcript": transcript(trace)}
    output.result(data, plain)


def _step_text(trace: "Trace", number: int) -> str:
    from replica.lab.trace import transcript_text  # noqa: PLC0415 - see above

    line = trace.lines[number]
    if line["type"] == "meter":
        count = f"{len(line['voters'])} of {line['need']} {line['phase']}s"
        return f"{line['who']} counts {count} for {' '.join(line['ops'])} in s{line['slot']}"
    return f"{line.get('who') or '--'} {transcript_text(line)}"


@lab_commands.command(
    "serve",
    short_help="Serve the page that draws the scenarios.",
    epilog=example("trustlog-replica lab serve", "trustlog-replica lab serve --attach my-cluster"),
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any free one.")
@click.option(
    "--attach", type=click.Path(path_type=Path), metavar="DIR", help="Show this cluster too, only to look at."
)
@output_option
def serve_command(*, host: str, port: int, attach: Path | None, output: Output) -> None:
    """Serve the page until Ctrl-C. It needs no network but the way to it, and no request changes anything.

    Whoever can connect can look; without --host only this machine can. With --attach they also see what the logs of
    that cluster say, operations included in number only, and its replicas' verdicts; the page has nothing that could
    change it.
    """
    import asyncio  # noqa: PLC0415 - see above

    from replica.lab import serve  # noqa: PLC0415 - aiohttp takes its time

    asyncio.run(serve.serve(host, port, attach, output))
