"""Checks what keeps the trusted base small and the cores pure; `make check` runs it, and it exits 1 on a violation.

1. trustlog/, its command line aside, imports the standard library and `cryptography` only.
2. The pure cores import nothing that does I/O, knows the time or is random, and call no such builtin: replica.core,
   client.core, PBFT's machine, and every module of ours that these import, followed to the end.
3. No `assert` in the three packages: `python -O` removes it.
4. The layers of .importlinter.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("trustlog", "replica", "client")
CORE_STDLIB = frozenset(
    [
        "__future__",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "struct",
        "typing",
    ]
)
CORE_THIRD_PARTY = frozenset({"sortedcontainers"})
# Whatever a core imports from these is checked like the core itself.
CORE_OWN = (
    "replica.core",
    "replica.application",
    "replica.pbft.machine",
    "replica.pbft.messages",
    "replica.pbft.pending",
    "client",
)
CORES = ("replica.core", "client.core", "replica.pbft.machine")
# The part of the trusted log that holds no state and touches no file.
CORE_TRUSTLOG = frozenset(
    f"trustlog{name}"
    for name in ("", ".errors", ".hashing", ".keys", ".merkle", ".receipts", ".statements", ".verification")
)
CORE_TRUSTLOG_NAMES_NOT = frozenset({"create", "open_log", "in_memory", "software", "sealed", "cli", "log"})
CORE_CALLS_NOT = frozenset(
    ["hash", "id", "open", "print", "input", "eval", "exec", "compile", "__import__", "breakpoint", "globals"]
)
# Loading the application named in the cluster file is configuration; it happens before the core runs.
CORE_EXCEPTIONS = {("replica.application", "importlib")}
TRUSTLOG_THIRD_PARTY = frozenset({"cryptography"})


class Import(NamedTuple):
    """One imported module, with the names taken from it."""

    line: int
    module: str
    names: tuple[str, ...]


def source_files(root: Path, package: str) -> dict[str, Path]:
    """Module name -> file, for every module under a package's directory."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(tree: ast.Module, module: str, path: Path) -> Iterator[Import]:
    """Every import anywhere in a file, in functions and type-checking blocks too; relative ones resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            yield Import(
                node.lineno,
                ".".join([*base, node.module] if node.module else base),
                tuple(alias.name for alias in node.names),
            )


def check_trusted_base(root: Path) -> list[str]:
    """Rule 1."""
    problems = []
    for module, path in source_files(root, "trustlog").items():
        if module == "trustlog.cli" or module.startswith("trustlog.cli."):
            continue
        for found in imports_of(ast.parse(path.read_bytes()), module, path):
            top = found.module.partition(".")[0]
            takes_cli = found.module.startswith("trustlog.cli") or (found.module == "trustlog" and "cli" in found.names)
            known = top == "trustlog" or top in sys.stdlib_module_names or top in TRUSTLOG_THIRD_PARTY
            if takes_cli or not known:
                problems.append(
                    f"{path.relative_to(root)}:{found.line}: the trusted base must not import {found.module}"
                )
    return problems


def check_cores(root: Path) -> tuple[list[str], list[str]]:
    """Rule 2: the problems, and the modules that were looked at."""
    modules = {name: path for package in PACKAGES for name, path in source_files(root, package).items()}
    waiting = [name for name in modules if any(within(name, core) for core in CORES)]
    seen = set(waiting)
    problems = []
    while waiting:
        module = waiting.pop()
        path = modules[module]
        tree = ast.parse(path.read_bytes())
        where = f"{path.relative_to(root)}:"
        for found in imports_of(tree, module, path):
            problem = core_import_problem(found, module)
            if problem:
                problems.append(f"{where}{found.line}: {problem}")
            for name in (found.module, *(f"{found.module}.{name}" for name in found.names)):
                if name in modules and name not in seen and any(within(name, own) for own in CORE_OWN):
                    seen.add(name)
                    waiting.append(name)
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        problems += [
            f"{where}{call.lineno}: a pure core must not call {call.func.id}()"
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id in CORE_CALLS_NOT
        ]
    return sorted(problems), sorted(seen)


def core_import_problem(found: Import, module: str) -> str:
    """Say why a core must not import this; an empty string if it may."""
    top = found.module.partition(".")[0]
    if top in CORE_STDLIB | CORE_THIRD_PARTY or any(within(found.module, own) for own in CORE_OWN):
        return ""
    if found.module == "replica" and set(found.names) <= {"core", "application"}:
        return ""
    if (module, top) in CORE_EXCEPTIONS:
        return ""
    if found.module in CORE_TRUSTLOG:
        taken = sorted(CORE_TRUSTLOG_NAMES_NOT.intersection(found.names))
        return f"a pure core must not take {', '.join(taken)} from trustlog" if taken else ""
    return f"a pure core must not import {found.module}"


def within(module: str, package: str) -> bool:
    """Say whether a module is this package or lies in it."""
    return module == package or module.startswith(package + ".")


def check_asserts(root: Path) -> list[str]:
    """Rule 3."""
    return [
        f"{path.relative_to(root)}:{node.lineno}: assert: raise an exception instead"
        for package in PACKAGES
        for path in source_files(root, package).values()
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Assert)
    ]


def check_layers(root: Path) -> tuple[bool, str]:
    """Rule 4: whether import-linter is content, and what it printed."""
    # The packages are those in the current directory, whatever is installed.
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    report = "\n".join(line for line in lines if line.isascii()).strip()
    return done.returncode == 0, report


def main() -> int:
    """Check the tree that this file stands in."""
    root = Path(__file__).resolve().parent.parent
    core_problems, cores = check_cores(root)
    problems = check_trusted_base(root) + core_problems + check_asserts(root)
    layered, report = check_layers(root)
    counts = {package: len(source_files(root, package)) for package in PACKAGES}
    print("trusted base: standard library and cryptography only; no assert anywhere:", counts)
    print("pure cores:", " ".join(cores))
    print(report if not layered else "\n".join(line for line in report.splitlines() if " KEPT" in line))
    for problem in problems:
        print(problem)
    empty = [package for package, count in counts.items() if not count]
    if empty or not any(within(name, "replica.core") for name in cores):
        print(f"nothing to check in {empty or 'replica.core'}: this program looks in the wrong place")
        return 1
    print("layers: ok" if layered and not problems else "layers: violated")
    return 0 if layered and not problems else 1


if __name__ == "__main__":
    sys.exit(main())
