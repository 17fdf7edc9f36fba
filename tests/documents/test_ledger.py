"""Every command line of every page is run by a test: ledger.toml says by which, and why the few others are not."""

import dataclasses

import pytest

from tests.documents.ledger import Ledger, compare, compare_all, pages, shown_lines, unrun_tests

# Kubernetes, and what would be fetched from elsewhere. Less is better; whoever needs more says so here.
UNRUN = 20

LEDGER = Ledger.read()
PAGE = """\
Say

    $ make demo KEEP=1    # it goes on

```sh
trustlog init mylog

FORMAT=1 trustlog status --all
```

```python
    print("no command")
```

    leaf = SHA-256(x)
"""
TEST = "tests/documents/test_make.py::test_the_simulators_lines"
EXAMPLE = Ledger(
    run={"p.md": {TEST: ["make demo KEEP=1", "trustlog init …"]}},
    unrun={"p.md": {"a reason": ["FORMAT=1 trustlog status --all"]}},
    text={"p.md": ["leaf ="]},
)


def test_every_command_line_of_every_page_has_its_entry_and_every_entry_its_line():
    found = pages()
    assert len(found) >= 22
    assert compare_all(found, LEDGER) == []


def test_every_test_that_is_named_exists_and_is_run():
    assert unrun_tests(LEDGER.tests()) == []


def test_few_lines_are_run_by_no_test_and_each_for_a_reason():
    unrun = LEDGER.without_a_test()
    for page, line, reason in unrun:
        print(f"{page}: {line}\n    {reason}")
    assert len(unrun) == UNRUN


def test_what_a_page_shows_is_found():
    assert list(shown_lines(PAGE)) == [
        "make demo KEEP=1",
        "trustlog init mylog",
        "FORMAT=1 trustlog status --all",
        "leaf = SHA-256(x)",
    ]
    assert compare("p.md", PAGE, EXAMPLE) == []


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("    leaf", "    trustlog bogus\n    leaf", ["p.md: not in the ledger: trustlog bogus"]),
        ("    leaf", "    kubectll get pods\n    leaf", ["p.md: not in the ledger: kubectll get pods"]),
        ("demo KEEP=1", "demo", ["p.md: not in the ledger: make demo", "p.md: stale: make demo KEEP=1"]),
        ("init mylog\n", "init mylog\ntrustlog init b\n", ["p.md: stands for more than one line: trustlog init …"]),
        ("    leaf = SHA-256(x)\n", "", ["p.md: stale: leaf ="]),
    ],
)
def test_a_page_that_changes_is_noticed(old, new, wrong):
    assert old in PAGE
    assert compare("p.md", PAGE.replace(old, new), EXAMPLE) == wrong


def test_a_ledger_that_lacks_an_entry_or_has_too_many_is_noticed():
    lacking = dataclasses.replace(EXAMPLE, unrun={})
    assert compare("p.md", PAGE, lacking) == ["p.md: not in the ledger: FORMAT=1 trustlog status --all"]
    twice = dataclasses.replace(EXAMPLE, unrun={"p.md": {"x": ["FORMAT=1 …", "make …"]}})
    assert compare("p.md", PAGE, twice) == ["p.md: in the ledger more than once: make demo KEEP=1"]
    assert compare_all({}, EXAMPLE) == ["p.md: no such page"]


MODULE = """\
import pytest

def helper(): ...

def test_well(): ...

@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.long)])
def test_some(x): ...

@pytest.mark.skipif(True, reason="never")
def test_skipped(): ...

@pytest.mark.long
def test_long(): ...

def test_not_now():
    pytest.skip("not now")
"""


@pytest.mark.parametrize(
    ("test", "wrong"),
    [
        ("tests/test_a.py::test_well", None),
        ("tests/test_a.py::test_some", None),
        ("make test-engine: tests/run_engine.py::test_well", None),
        ("tests/test_b.py::test_well", "no such file"),
        ("tests/test_a.py::test_other", "no such test"),
        ("tests/test_a.py::helper", "no such test"),
        ("tests/test_a.py::test_skipped", "it is marked so that it is not run"),
        ("tests/test_a.py::test_long", "it is marked so that it is not run"),
        ("tests/test_all.py::test_well", "it is marked so that it is not run"),
        ("tests/test_a.py::test_not_now", "it skips itself"),
        ("tests/run_engine.py::test_well", "make test does not collect it"),
        ("make test-engine: tests/test_a.py::test_well", "make test-engine does not run it"),
        ("make test-other: tests/run_engine.py::test_well", "make test-other does not run it"),
    ],
)
def test_a_test_that_is_none_or_is_not_run_is_noticed(tmp_path, test, wrong):
    (tmp_path / "tests").mkdir()
    for name in ("test_a.py", "run_engine.py"):
        (tmp_path / "tests" / name).write_text(MODULE)
    (tmp_path / "tests" / "test_all.py").write_text(f"{MODULE}\npytestmark = [pytest.mark.skip]\n")
    (tmp_path / "Makefile").write_text("test-engine: x ## Run\n\tpytest tests/run_engine.py\n")
    assert unrun_tests([test], tmp_path) == ([] if wrong is None else [f"{test}: {wrong}"])
