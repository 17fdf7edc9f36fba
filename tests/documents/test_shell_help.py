"""Version, completion and man pages, as a shell and `man` use them, of all three programs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.cli.main import cli as client
from replica.cli.main import cli as replica
from trustlog.cli.build import build_information, commit, sources_digest
from trustlog.cli.main import cli as log

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "trustlog": ("trustlog", log),
    "trustlog-replica": ("replica", replica),
    "trustlog-client": ("client", client),
}


def run(program, *arguments, cwd=ROOT, **environment):
    command = [sys.executable, "-m", f"{PROGRAMS[program][0]}.cli.main", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_version_says_what_was_built(program, tmp_path):
    done = run(program, "--version", cwd=tmp_path)
    first, *others = done.stdout.splitlines()
    assert (done.returncode, first.split()[1]) == (0, "0.1.0")
    said = dict(line.split(" ", 1) for line in others)
    assert set(said) == {"commit", "sources", "python", "cryptography", "sqlite"}
    assert said["sources"] == f"sha256:{sources_digest()}" == build_information()["sources"]
    assert re.fullmatch(r"[0-9a-f]{40}", said["commit"])


def test_the_commit_is_what_git_says():
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert commit() == said.stdout.strip()


def test_another_file_is_another_build(tmp_path, monkeypatch):
    from trustlog.cli import build

    for package in ("trustlog", "replica", "client"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(build, "_ROOT", tmp_path)
    before = build.sources_digest()
    (tmp_path / "client" / "a.py").write_text("x = 2\n")
    assert build.sources_digest() != before
    assert build.commit() is None or build.commit() == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_shell_is_answered(program):
    variable = f"_{program}_COMPLETE".replace("-", "_").upper()
    words = {"COMP_WORDS": f"{program} ", "COMP_CWORD": "1", variable: "bash_complete"}
    done = run(program, **words)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == set(PROGRAMS[program][1].commands)
    words["COMP_WORDS"] = f"{program} --"
    assert "plain,--version" in run(program, **words).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_shell_it_says_which_there_are(program):
    done = run(program, "completion")
    assert done.returncode == 2
    assert "Choose from: bash, zsh, fish" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_for_that_shell(program, shell, tmp_path):
    done = run(program, "completion", shell)
    assert done.returncode == 0, done.stderr
    assert f"_COMPLETE={shell}_complete" in done.stdout
    (tmp_path / "script").write_text(done.stdout)
    found = shutil.which(shell)
    if found is not None:
        assert subprocess.run([found, "-n", tmp_path / "script"], check=False).returncode == 0


def test_bash_completes_a_command(tmp_path):
    """As a user's shell does it: the script is read, and its function called for what was typed."""
    program = tmp_path / "trustlog-replica"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m replica.cli.main "$@"\n')
    program.chmod(0o755)
    script = run("trustlog-replica", "completion", "bash").stdout
    typed = 'COMP_WORDS=(trustlog-replica doc); COMP_CWORD=1; _trustlog_replica_completion trustlog-replica; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{typed}"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "doctor", done.stderr


def test_every_command_has_a_page_that_can_be_shown(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "man" / "pages.py", tmp_path / "man"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text() for path in (tmp_path / "man").iterdir()}
    for program, (_, group) in PROGRAMS.items():
        assert {program} | {f"{program}-{name}" for name in group.commands} <= set(pages)
    assert "trustlog-replica-debug-dump" in pages
    for name, text in pages.items():
        assert ".SH EXAMPLE\n" in text, name
        assert ".SH EXIT STATUS\n" in text, name
        assert "\b" not in text, name
        title = name.upper().replace("-", r"\-")
        assert text.startswith(f'.TH "{title}" "1" "" "trustlog '), name
    assert r"\fB\-\-retain\-mib\fP" in pages["trustlog-replica-run"]
    assert "TRUSTLOG_RETAIN_MIB" in pages["trustlog-replica-run"]
    groff = shutil.which("groff")
    if groff is not None:
        shown = subprocess.run(
            [groff, "-k", "-man", "-Tutf8", "-ww", *sorted((tmp_path / "man").iterdir())],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "trustlog-replica restore" in shown.stdout
