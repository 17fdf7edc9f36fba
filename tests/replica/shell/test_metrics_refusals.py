"""Refusals that have a series from the start are those that the code can make: none is misspelt, or gone."""

import re
from pathlib import Path

from replica.shell.metrics import REFUSALS

ROOT = Path(__file__).parents[3]
# Reasons that the code puts together of a first word and another one, or the name of an enumeration's member.
JOINED = ("group", "hello")


def test_every_refusal_with_a_series_is_made_somewhere():
    files = [path for name in ("replica", "trustlog") for path in (ROOT / name).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path.name != "metrics.py" and path.parent.name != "sim")

    def is_made(reason):
        first, _, rest = reason.partition("-")
        joined = rf'"{rest}"|\b{rest.upper().replace("-", "_")}\b'
        return f'"{reason}"' in code or (first in JOINED and re.search(joined, code) is not None)

    assert [reason for reason in REFUSALS if not is_made(reason)] == []
    assert sorted(set(REFUSALS)) == list(REFUSALS)
