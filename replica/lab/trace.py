"""The trace of a run: JSON lines, the header first, the verdict last, each thing that happened in between.

Times are virtual milliseconds. Nodes are named "r0", "r1"… (replicas) and "A", "B"… (clients). Bytes are hexadecimal.

    header    format, scenario, title, system, n, f, quorum, seed, begins (ms; what lies before is the same in all
              runs), tells, expects, lanes: [{id, name, faulty}]
    append    who, attested (by a log, or only signed), copy (0, or 1 for what is said with a second copy of a log),
              chain ("log", or "outcome" for a log of outcomes), first, last, head_before, head, statement, signature,
              verifies, entries: [{index, kind, view, slot, digest, ops, text}]
    message   from, to, sent, label, kind ("group", "request", "reply", "fetch", "state", "message"), and for a group
              log, first, last, head; became: "read", "waits" (read in order, its causes are missing), "early" (a gap
              lies before it), "ignored", "forked", "refused", "lost"
    meter     who, view, slot, phase ("vote", "commit"), digest, ops, voters, need: what `who` has counted so far
    execute   who, slot, digest, ops
    view      who, view, what ("entered", "opened"), text
    ask, answer   who, op, and slot of the answer
    note      who (or null: the script), text, about ("script", "exposed", "lied", "forked", "halt", "fetch", "early",
              "state", "reply")
    quorums   sets: [{label, members}], common, text: why two quorums cannot miss each other, or can
    violation kind, text: a thing that must never happen, and did
    verdict   safe, live, expected, happened, as_expected, decided_by: the step that decided it, text

Every line carries `at` and `step`, its number. A reader passes over types and fields that it does not know.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

FORMAT = "trustlog-lab/1"
# Of a run: what its header may say.
SEED_MAX = 1_000_000

Line = dict[str, Any]


@dataclass(slots=True)
class Trace:
    """One run, line by line. lines[i]["step"] is i."""

    lines: list[Line] = field(default_factory=list)

    def add(self, kind: str, at_ms: int, /, **fields: Any) -> Line:  # noqa: ANN401 - whatever JSON has
        """Add a line, and return it."""
        line: Line = {"type": kind, "at": at_ms, "step": len(self.lines), **fields}
        self.lines.append(line)
        return line

    @property
    def header(self) -> Line:
        """The first line."""
        return self.lines[0]

    @property
    def verdict(self) -> Line:
        """The last line."""
        return self.lines[-1]

    def of(self, *kinds: str) -> list[Line]:
        """Return the lines of these types."""
        return [line for line in self.lines if line["type"] in kinds]

    def first(self, matches: Callable[[Line], bool]) -> Line | None:
        """Return the first line for which `matches` says so, or None."""
        return next((line for line in self.lines if matches(line)), None)

    def json_lines(self) -> str:
        """Return the trace as it is stored and sent."""
        return "".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in self.lines)


def disagreement(trace: Trace) -> str:
    """Return which correct replicas executed what at one slot, if that differs; else ""."""
    faulty = {lane["id"] for lane in trace.header["lanes"] if lane["faulty"]}
    done: dict[int, Line] = {}
    for line in trace.of("execute"):
        if line["who"] not in faulty:
            other = done.setdefault(line["slot"], line)
            if other["digest"] != line["digest"]:
                mine, theirs = (" ".join(found["ops"]) or "null" for found in (line, other))
                who, whom = (found["who"].removeprefix("r") for found in (line, other))
                return f"in slot {line['slot']} replica {whom} executed {theirs}, and replica {who} executed {mine}"
    return ""


def read_json_lines(text: str) -> Trace:
    """Read a stored trace. ValueError says what is wrong."""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not lines or lines[0].get("format") != FORMAT:
        raise ValueError(f"this is no trace: the first line must be a header with the format {FORMAT}")
    return Trace(lines)


def transcript(trace: Trace) -> list[str]:
    """Return the trace for a reader on a terminal: one line for each thing, without the messages."""
    begins = trace.header["begins"]
    told = [line for line in trace.lines if line["at"] >= begins]
    words = [(line, text) for line in told if (text := transcript_text(line))]
    width = max((len(_who(line)) for line, _ in words), default=0)
    return [f"{line['step']:5} {line['at']:6} ms  {_who(line):{width}}  {text}" for line, text in words]


def _who(line: Line) -> str:
    who: str | None = line.get("who")
    return "--" if who is None else who


def transcript_text(line: Line) -> str:
    """Return what a transcript says of a line; "" for nothing."""
    kind = line["type"]
    if kind == "append":
        said = "; ".join(entry["text"] for entry in line["entries"])
        if not line["attested"]:
            return f"signs{' for others' if line['copy'] else ''} {said}"
        copy = ", with the second copy of its log" if line["copy"] else ""
        chain = "" if line["chain"] == "log" else f"{line['chain']} "
        return f"appends {chain}{_span(line)}{copy}: {said}"
    if kind == "execute":
        return f"executes s{line['slot']} ({' '.join(line['ops']) or 'null'})"
    if kind == "ask":
        return f"asks for {line['op']}"
    if kind == "answer":
        return f"is answered: {line['op']} was executed in s{line['slot']}"
    return str(line["text"]) if kind in {"note", "view", "violation", "quorums"} else ""


def _span(line: Line) -> str:
    first, last = line["first"], line["last"]
    return f"{first}" if first == last else f"{first}-{last}"


def numbered(nodes: Iterable[int]) -> list[str]:
    """Return replicas' names in traces."""
    return [f"r{number}" for number in nodes]
