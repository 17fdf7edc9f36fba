r"""A trace as a log with vector clocks, for ShiViz (Beschastnikh et al., ACM Queue 2016), which draws such logs.

Each event is two lines: `host {"host": clock, …}`, then what happened. ShiViz reads that with the regular expression

    (?<host>\S*) (?<clock>{.*})\n(?<event>.*)
"""

import json
from collections.abc import Iterator

from replica.lab.trace import Line, Trace, transcript_text

_LOCAL = frozenset({"append", "execute", "view", "ask", "answer", "note"})


def shiviz(trace: Trace) -> str:
    """Return the log."""
    clocks: dict[str, dict[str, int]] = {lane["id"]: {} for lane in trace.header["lanes"]}
    carried: dict[int, dict[str, int]] = {}  # a message's line -> its sender's clock when it was sent
    told = []
    for _, _, line, is_send in sorted(_events(trace), key=lambda event: event[:2]):
        is_message = line["type"] == "message"
        host = line["from"] if is_send else line["to"] if is_message else line["who"]
        clock = clocks[host]
        if is_message and not is_send:
            for name, count in carried[line["step"]].items():
                clock[name] = max(clock.get(name, 0), count)
        clock[host] = clock.get(host, 0) + 1
        if is_send:
            carried[line["step"]] = dict(clock)
        text = transcript_text(line)
        if is_message:
            text = f"sends {line['to']}: {line['label']}" if is_send else f"hears {line['from']}: {line['label']}"
        told.append(f"{host} {json.dumps(clock)}\n{text}\n")
    return "".join(told)


def _events(trace: Trace) -> Iterator[tuple[int, int, Line, bool]]:
    """Yield (time, order within it, line, whether it is the sending); a message takes a millisecond at least."""
    end = len(trace.lines)
    for line in trace.lines:
        if line["type"] == "message":
            yield line["sent"], end + line["step"], line, True
            if line["became"] != "lost":
                yield line["at"], line["step"], line, False
        elif line["type"] in _LOCAL and line.get("who") is not None:
            yield line["at"], line["step"], line, False
