"""What decides a scenario: lines of its trace, and what must hold besides."""

from collections.abc import Callable

from replica.lab import scripts
from replica.lab.stage import LabStage
from replica.lab.trace import Line


def violated(kind: str) -> Callable[[Line], bool]:
    """Return what finds a violation of this kind."""
    return lambda line: bool(line["type"] == "violation" and line["kind"] == kind)


def noted(about: str, text: str = "") -> Callable[[Line], bool]:
    """Return what finds a note about this, with this text, after the beginning that all runs share."""

    def holds(line: Line) -> bool:
        return bool(line["type"] == "note" and line["about"] == about and text in line["text"] and line["at"] > 150)

    return holds


def passed_over(line: Line) -> bool:
    """Say whether client B does not count a reply."""
    return bool(line["type"] == "note" and line["about"] == "reply" and line["who"] == "B")


def clients_agree(stage: LabStage) -> bool:
    """Say whether A alone believes an outcome of slot 5."""
    believed: dict[int, set[str]] = {}
    for line in stage.lab_trace.of("answer"):
        believed.setdefault(line["slot"], set()).add(line["who"])
    return believed.get(5) == {"A"}


def follows(line: Line) -> bool:
    """Say whether replica 2 executes A2."""
    return bool(line["type"] == "execute" and line["who"] == "r2" and line["ops"] == ["A2"])


def opened(line: Line) -> bool:
    """Say whether a replica reads that a view is open."""
    return bool(line["type"] == "view" and line["what"] == "opened")


def is_short_of_a_quorum(line: Line) -> bool:
    """Replica 1 has its own vote for B2 and the primary's, and no more come."""
    is_vote = line["type"] == "meter" and line["who"] == "r1" and line["phase"] == "vote"
    return bool(is_vote and line["ops"] == ["B2"] and len(line["voters"]) == line["need"] - 1)


def named_by_all(stage: LabStage) -> bool:
    """Say whether every correct replica holds evidence against log 0."""
    return scripts.who_noticed_the_fork(stage) == {"r1", "r2"}


def exposes(log: int) -> tuple[str, Callable[[LabStage], bool]]:
    """Return a condition: every correct replica exposes this log."""

    def holds(stage: LabStage) -> bool:
        by = {reader for reader, exposed in stage.facts.exposed if exposed == log}
        return by == set(stage.correct)

    return (f"every correct replica exposes replica {log}", holds)


def alone_moves_nothing(stage: LabStage) -> bool:
    """Say whether, before A tells all, replica 2 alone suspects and no view changes."""
    early = [line for line in stage.lab_trace.of("view") if line["at"] < scripts.TELLS_ALL_MS]
    wishes = [line for line in stage.lab_trace.of("append") if "SUSPECT v0" in _texts(line)]
    lonely = {line["who"] for line in wishes if line["at"] < scripts.TELLS_ALL_MS}
    return not early and lonely == {"r2"}


def _texts(line: Line) -> list[str]:
    return [entry["text"] for entry in line["entries"]]
