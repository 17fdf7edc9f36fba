"""Which test runs which command line of which page: what ledger.toml says, compared with the pages and the tests.

A page's indented lines, and those of its blocks of shell, are commands, or text that the ledger calls text: what a line is, is
said, not guessed. Each command has exactly one entry, which names the test that runs it or the reason why none does.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
LEDGER = Path(__file__).with_suffix(".toml")
MORE = "…"
SHELL = {"", "sh", "bash", "shell", "console"}
# With these a test is not run, or not by `make test`, or its failure is none.
NOT_RUN = re.compile(r"\bmark\.(skip|skipif|xfail|long)\b")


@dataclass(frozen=True, slots=True)
class Ledger:
    """Of each page: its lines by the test that runs them, by the reason why none does, and beginnings of lines that are text."""

    run: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)
    unrun: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)
    text: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = LEDGER) -> Self:
        return cls(**tomllib.loads(path.read_text()))

    def pages(self) -> set[str]:
        return {*self.run, *self.unrun, *self.text}

    def commands(self, page: str) -> list[str]:
        return [line for part in (self.run, self.unrun) for lines in part.get(page, {}).values() for line in lines]

    def tests(self) -> set[str]:
        return {test for of_page in self.run.values() for test in of_page}

    def without_a_test(self) -> list[tuple[str, str, str]]:
        """Return page, line and reason of each line that no test runs."""
        return [
            (page, line, reason)
            for page, reasons in self.unrun.items()
            for reason, lines in reasons.items()
            for line in lines
        ]


def pages() -> dict[str, str]:
    """Return every page that git knows, or would, by its path."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (ROOT / name).read_text() for name in listed}


def shown_lines(content: str) -> Iterator[str]:
    """Yield what a page shows as typed or printed: indented lines, and blocks of shell or of nothing in particular."""
    block: str | None = None
    for line in content.splitlines():
        if line.startswith("```"):
            block = line.removeprefix("```").strip() if block is None else None
        elif block in SHELL or (block is None and line.startswith("    ")):
            shown = line.strip().removeprefix("$ ").split(" #")[0].strip()
            if shown:
                yield shown


def is_meant(entry: str, line: str) -> bool:
    """Tell whether an entry stands for this line: the whole of it, or its beginning before an ellipsis."""
    return line.startswith(entry.removesuffix(MORE)) if entry.endswith(MORE) else line == entry


def compare(page: str, content: str, ledger: Ledger) -> list[str]:
    """Return what is wrong between one page and its entries."""
    lines = list(dict.fromkeys(shown_lines(content)))
    entries, text = ledger.commands(page), ledger.text.get(page, [])
    wrong = []
    for line in lines:
        found = sum(is_meant(entry, line) for entry in entries) + any(line.startswith(word) for word in text)
        if found != 1:
            wrong.append(f"{page}: {'not in the ledger' if not found else 'in the ledger more than once'}: {line}")
    for entry in entries:
        meant = sum(is_meant(entry, line) for line in lines)
        if meant != 1:
            wrong.append(f"{page}: {'stale' if not meant else 'stands for more than one line'}: {entry}")
    wrong += [f"{page}: stale: {word}" for word in text if not any(line.startswith(word) for line in lines)]
    return wrong


def compare_all(pages: Mapping[str, str], ledger: Ledger) -> list[str]:
    """Return what is wrong between these pages, by their path, and the ledger."""
    wrong = [f"{page}: no such page" for page in sorted(ledger.pages() - set(pages))]
    return wrong + [one for page, content in pages.items() for one in compare(page, content, ledger)]


def unrun_tests(tests: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return what is wrong with the tests that are named: FILE::FUNCTION, run by `make test`, or TARGET: FILE::FUNCTION."""
    return [f"{test}: {wrong}" for test in sorted(tests) if (wrong := _wrong_with(test, root)) is not None]


def _wrong_with(test: str, root: Path) -> str | None:
    target, _, where = test.rpartition(": ")
    file, _, name = where.partition("::")
    if not (root / file).is_file():
        return "no such file"
    tree = ast.parse((root / file).read_text())
    functions = {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    if name not in functions or not name.startswith("test_"):
        return "no such test"
    marks = list(functions[name].decorator_list)
    marks += [
        one.value for one in tree.body if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "pytestmark"
    ]
    # A parameter's mark is that parameter's alone.
    if any(NOT_RUN.search(re.sub(r"pytest\.param\(.*?\)", "", ast.unparse(mark))) for mark in marks):
        return "it is marked so that it is not run"
    first = [ast.unparse(one) for one in functions[name].body if isinstance(one, ast.Expr)]
    if any(re.match(r"pytest\.(skip|xfail)\(", one) for one in first):
        return "it skips itself"
    if not target:
        return None if re.fullmatch(r"tests/(\w+/)*test_\w+\.py", file) else "make test does not collect it"
    recipe = re.search(
        rf"^{re.escape(target.removeprefix('make '))}:.*\n((?:\t.*\n)+)", (root / "Makefile").read_text(), re.MULTILINE
    )
    return None if recipe is not None and file in recipe[1] else f"{target} does not run it"
