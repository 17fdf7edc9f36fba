"""`trustlog-replica sim`: run seeds of the simulator, or replay one."""

import os
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from trustlog.cli.contract import CommandError, Exit, Output, example, output_option

if TYPE_CHECKING:
    from replica.sim.campaign import Summary
    from replica.sim.run import Outcome


@click.command(
    "sim",
    short_help="Try to break the protocol in a simulated world.",
    epilog=example(
        "trustlog-replica sim --seeds 100",
        "trustlog-replica sim --seed 17 --remarks",
    ),
)
@click.option("--seeds", type=click.IntRange(1), default=100, show_default=True, help="How many seeds to run.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one per processor]")
@click.option("--seed", type=click.IntRange(0), help="Run this one seed only.")
@click.option("--trace", is_flag=True, help="With --seed: print everything that happens, to standard error.")
@click.option("--remarks", is_flag=True, help="Likewise, but only what replicas say and do, without the network.")
@output_option
@click.pass_context
def sim_command(
    context: click.Context,
    *,
    seeds: int,
    first: int,
    jobs: int | None,
    seed: int | None,
    trace: bool,
    remarks: bool,
    output: Output,
) -> Exit:
    """Run real replica and client cores in virtual time, under a network and replicas that do their worst.

    Everything follows from a seed. Exit code 1: a violation was found; its seed is printed.
    """
    # Imported here: the other commands answer sooner without it.
    from replica.sim.campaign import campaign, show_progress  # noqa: PLC0415
    from replica.sim.run import run_seed  # noqa: PLC0415

    _refuse_what_would_be_ignored(context, "a campaign" if seed is None else "one seed")
    if seed is not None:
        outcome = run_seed(seed, trace=_trace_line if trace else _remark_line if remarks else None)
        _show_outcome(output, outcome)
        return Exit.NEGATIVE if outcome.violations else Exit.OK
    summary = campaign(first, seeds, jobs or os.cpu_count() or 1, show_progress)
    _show_summary(output, summary)
    if summary.is_interrupted:
        raise KeyboardInterrupt
    return Exit.OK if summary.is_good else Exit.NEGATIVE


_OF_A_CAMPAIGN = ("seeds", "first", "jobs")
_OF_ONE_SEED = ("trace", "remarks")


def _refuse_what_would_be_ignored(context: click.Context, what: str) -> None:
    foreign, hint = (
        (_OF_ONE_SEED, "choose one run to look at, with --seed")
        if what == "a campaign"
        else (_OF_A_CAMPAIGN, "leave it out, or --seed")
    )
    for name in foreign:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise CommandError(f"--{name} means nothing for {what}", hint, Exit.USAGE, code="usage")


def _trace_line(line: str) -> None:
    click.echo(line, err=True)


def _remark_line(line: str) -> None:
    time, _, rest = line.partition(" ")
    if rest.startswith("# "):
        click.echo(f"{time} {rest[2:]}", err=True)


def _show_outcome(output: Output, outcome: "Outcome") -> None:
    from replica.sim.campaign import outcome_as_data  # noqa: PLC0415

    lines = [f"seed={outcome.seed}", f"trace_hash={outcome.trace_hash}", f"simulated_ms={outcome.virtual_ms}"]
    lines += _violations(outcome)
    output.result(outcome_as_data(outcome), lines)


def _show_summary(output: Output, summary: "Summary") -> None:
    from replica.sim.campaign import EXPECTED_FROM_SEEDS  # noqa: PLC0415

    hours = summary.virtual_ms / 3_600_000
    lines = [f"seeds={summary.seeds}", f"simulated_hours={hours:.2f}", f"failed={len(summary.failed)}"]
    lines += [f"{name}={count}" for name, count in sorted(summary.counts.items())]
    if summary.is_interrupted:
        lines += ["interrupted: these are the seeds that were run"]
    if not summary.is_complete:
        lines += [f"what never happened was not looked at: that takes {EXPECTED_FROM_SEEDS} seeds"]
    lines += [f"never happened: {name}" for name in summary.missing()]
    for outcome in sorted(summary.failed, key=lambda o: o.seed):
        lines += [f"seed {outcome.seed} FAILED; replay: trustlog-replica sim --seed {outcome.seed} --trace"]
        lines += _violations(outcome)
    output.result(summary.as_data(), lines)


def _violations(outcome: "Outcome") -> list[str]:
    return [f"violation {v.kind} at {v.at_ms} ms: {v.text}" for v in outcome.violations]
