"""SECURITY.md names a test for each thing it promises: they exist, and each is used."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()


def test_every_test_it_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) >= 16
    for path, name in named:
        source = ROOT / path
        assert source.is_file(), path
        assert not name or f"def {name}(" in source.read_text(), f"{path}::{name}"


def test_every_number_leads_to_a_test_and_is_used():
    table, _, listed = PAGE.partition("T1 `tests/")
    defined = [1, *(int(number) for number in re.findall(r"\bT(\d+) `tests/", listed))]
    assert defined == list(range(1, len(defined) + 1))
    assert {int(number) for number in re.findall(r"\bT(\d+)\b", table)} == set(defined)
