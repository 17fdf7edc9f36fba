from __future__ import annotations

import errno
import io
import json
import os

import click
import pytest

from trustlog.cli import contract
from trustlog.cli.contract import (
    CommandError,
    Exit,
    FiniteFloat,
    Output,
    example,
    grid,
    key_values,
    output_option,
    printable,
    run,
)
from trustlog.errors import MisuseError, SealedStateError, TrustLogError, VerificationError


class Failing:
    """What the command of the program under test raises or returns."""

    outcome = None


@click.group()
def program():
    """A program under the contract."""


@program.command(epilog=example("program act"))
@output_option
def act(output):
    """Do what the test wants."""
    if isinstance(Failing.outcome, BaseException):
        raise Failing.outcome
    output.result({"answer": 42}, "answer 42", key_values({"answer": 42}))
    return Failing.outcome


def ran(capsys, outcome, *arguments):
    Failing.outcome = outcome
    with pytest.raises(SystemExit) as caught:
        run(program, ["act", *arguments], "program")
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


FAILURES = [
    (CommandError("no quorum", "wait", Exit.UNREACHABLE, code="undecided"), 3, "undecided"),
    (CommandError("no"), 1, "failed"),
    (VerificationError("wrong-head", "no"), 1, "wrong-head"),
    (SealedStateError("no"), 1, "damaged"),
    (MisuseError("no"), 2, "misuse"),
    (TrustLogError("no"), 1, "failed"),
    (click.UsageError("no"), 2, "usage"),
    (click.ClickException("no"), 2, "usage"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 3, "unreachable"),
    (TimeoutError("no"), 3, "unreachable"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "os-error"),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "os-error"),
    (OSError("no"), 1, "os-error"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (click.Abort(), 130, "interrupted"),
]


@pytest.mark.parametrize(("failure", "exit_code", "code"), FAILURES, ids=lambda value: repr(value)[:40])
def test_failures(capsys, failure, exit_code, code):
    got, out, err = ran(capsys, failure, "-o", "json")
    assert (got, err) == (exit_code, "")
    document = json.loads(out)
    assert document["schema_version"] == 1
    assert (document["error"]["code"], document["error"]["exit"]) == (code, exit_code)
    got, out, err = ran(capsys, failure, "-o", "plain")
    assert (got, out) == (exit_code, "")
    assert err.startswith("error: ")


def test_only_the_logs_own_program_speaks_of_signing(capsys):
    assert "signed" not in ran(capsys, OSError(errno.ENOSPC, "No space left on device"))[2]


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "1e999", "x", "0", "11"])
def test_numbers_are_finite_and_within_bounds(text):
    option = click.Option(["--seconds"], type=FiniteFloat(0, 10, min_open=True))
    assert option.type.convert("2.5", option, None) == 2.5
    with pytest.raises(click.BadParameter):
        option.type.convert(text, option, None)


def test_what_click_says_is_one_line_and_names_the_commands_own_help(capsys):
    @click.group()
    def tool():
        pass

    @tool.group()
    def inner():
        pass

    @inner.command()
    @click.argument("shell", type=click.Choice(["bash", "zsh"]))
    @click.argument("numbers", nargs=2)
    def act(**_):
        pass

    for words in ([], ["bash", "3"]):
        with pytest.raises(SystemExit):
            run(tool, ["inner", "act", *words], "tool")
        error, hint = capsys.readouterr().err.splitlines()
        assert "\\" not in error
        assert hint == "hint: see: tool inner act --help"


def test_a_whole_column_is_not_broken(capsys):
    rows = [["127.0.0.1:7200", *["x" * 20] * 7]]
    for whole in ((), ("address",)):
        Output("table").result({}, "", grid(["address", *"abcdefg"], rows, whole=whole))
        assert ("127.0.0.1:7200 " in capsys.readouterr().out) is bool(whole)


def test_unexpected_failures_are_not_hidden(capsys):
    Failing.outcome = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(program, ["act"], "program")


def test_results(capsys):
    assert ran(capsys, None, "-o", "json") == (0, '{"schema_version": 1, "answer": 42}\n', "")
    assert ran(capsys, None) == (0, "answer 42\n", "")
    assert ran(capsys, None, "-o", "table") == (0, "answer  42\n", "")
    assert ran(capsys, Exit.NEGATIVE, "-o", "plain")[0] == 1
    assert ran(capsys, Exit.UNREACHABLE, "-o", "plain")[0] == 3


def test_table_is_the_default_of_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    assert Output().format == "table"
    terminal.isatty = lambda: False
    assert Output().format == "plain"


def test_a_table_that_is_not_given_falls_back_to_lines(capsys):
    Output("table").result({}, ["a\nb", "c"])
    assert capsys.readouterr().out == "a\\nb\nc\n"


def test_grid_escapes_and_takes_no_markup(capsys):
    Output("table").result({}, "", grid(["name", "[red]x"], [["a\x1b[0m", "[bold]b"], [1, None]]))
    out = capsys.readouterr().out
    assert "a\\x1b[0m" in out
    assert "[bold]b" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["-o", "json"], True),
        (["-ojson"], True),
        (["--output", "json"], True),
        (["--output=json"], True),
        (["-o"], False),
        (["-o", "plain"], False),
        (["--", "-o", "json"], False),
        (["-o", "json", "-o", "plain"], False),
        ([], False),
    ],
)
def test_usage_errors_are_json_when_json_was_asked_for(capsys, arguments, wanted):
    assert contract._wants_json(arguments) is wanted
    with pytest.raises(SystemExit) as caught:
        run(program, ["act", "--bad", *arguments], "program")
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert (captured.out != "") is wanted
    assert (captured.err == "") is wanted
    if wanted:
        assert json.loads(captured.out)["error"]["code"] == "usage"


def test_printable():
    assert printable("plain ü 漢字") == "plain ü 漢字"
    assert printable("\x1b\x00\n\t\x9b\u2028\u202e\ud800\ue000") == "\\x1b\\x00\\n\\t\\x9b\\u2028\\u202e\\ud800\\ue000"


def test_a_refused_permission_names_the_user_and_the_path():
    said = contract.as_command_error(PermissionError(errno.EACCES, "Permission denied", "/var/lib/log"))
    assert said.message == f"Permission denied: /var/lib/log (as user {os.geteuid()})"
    assert said.exit_code == Exit.USAGE
