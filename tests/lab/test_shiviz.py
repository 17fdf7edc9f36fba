"""The exported log: its clocks grow, and what is heard happened after it was sent."""

from __future__ import annotations

import json
import re

import pytest

from replica.lab.scenarios import SCENARIOS
from replica.lab.shiviz import shiviz

PATTERN = re.compile(r"(?P<host>\S*) (?P<clock>{.*})\n(?P<event>.*)\n")


@pytest.mark.parametrize("name", ["equivocation-three-phase", "pbft-equivocation", "hidden-vote-two-phase"])
def test_the_clocks_are_vector_clocks(name: str) -> None:
    log = shiviz(SCENARIOS[name].run())
    events = [(m["host"], json.loads(m["clock"]), m["event"]) for m in PATTERN.finditer(log)]
    assert "".join(f"{h} {json.dumps(c)}\n{e}\n" for h, c, e in events) == log
    own: dict[str, int] = {}
    for host, clock, _ in events:
        own[host] = own.get(host, 0) + 1
        assert clock[host] == own[host]
        # Nobody knows more of another than has happened there.
        assert all(count <= own.get(other, 0) for other, count in clock.items())
    sent = [(h, c, e) for h, c, e in events if e.startswith("sends")]
    heard = [(h, c, e) for h, c, e in events if e.startswith("hears")]
    assert sent
    for host, clock, event in heard:
        source, label = re.fullmatch(r"hears (\S+): (.*)", event).groups()
        matches = [c for h, c, e in sent if h == source and e == f"sends {host}: {label}"]
        assert any(all(count <= clock.get(name, 0) for name, count in c.items()) for c in matches)
