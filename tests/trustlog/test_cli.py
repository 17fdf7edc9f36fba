"""The program as its users start it: one process per command, in a directory with a space in its name."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.trustlog.support import NONCE, OTHER_NONCE, flip
from trustlog.cli.contract import run
from trustlog.cli.main import cli

PROGRAM = [sys.executable, "-m", "trustlog.cli.main"]
COMMANDS = ["init", "append", "lookup", "end", "truncate", "verify", "serve"]


class Shell:
    def __init__(self, directory):
        self.directory = directory

    def __call__(self, *arguments, code=0, stdin=b""):
        result = subprocess.run(
            [*PROGRAM, *arguments], cwd=self.directory, input=stdin, capture_output=True, check=False
        )
        out, err = result.stdout.decode(), result.stderr.decode()
        assert result.returncode == code, (out, err)
        assert "Traceback" not in err
        if code:
            assert err.startswith("error: ") or not err
        return out, err

    def json(self, *arguments, code=0, stdin=b""):
        out, err = self(*arguments, "-o", "json", code=code, stdin=stdin)
        assert err == ""
        document = json.loads(out)
        assert document["schema_version"] == 1
        if code:
            assert set(document["error"]) == {"code", "message", "hint", "exit"}
            assert document["error"]["exit"] == code
            return document["error"]
        return document


@pytest.fixture
def shell(tmp_path):
    directory = tmp_path / "a place"
    directory.mkdir()
    return Shell(directory)


@pytest.fixture(scope="module")
def written_log(tmp_path_factory):
    """The folder of a log with three entries, to be copied."""
    shell = Shell(tmp_path_factory.mktemp("written"))
    shell("init", "my log")
    shell("append", "my log", "hello")
    shell("append", "my log", "-", stdin=b"two\nthree\n")
    return shell.directory / "my log"


@pytest.fixture
def log(shell, written_log):
    shutil.copytree(written_log, shell.directory / "my log")
    return shell


def save(shell, name, document):
    (shell.directory / name).write_text(json.dumps(document))
    return name


def test_a_log_for_a_service_is_opened_by_nothing_else(shell):
    created = shell.json("init", "--backend", "process", "my log")
    assert created["backend"] == "process"
    assert "does not protect against root" in created["protection"]
    for command in (["append", "my log", "x"], ["end", "my log"], ["truncate", "my log", "1"]):
        assert "its own program opens it: trustlog serve" in shell.json(*command, code=2)["message"]


def test_from_init_to_verification(shell):
    created = shell.json("init", "my log")
    assert "thief" in created["protection"]
    assert created["backend"] == "software"
    appended = shell.json("append", "my log", "hello")
    assert (appended["first"], appended["last"], len(appended["digests"])) == (1, 1, 1)
    group = shell.json("append", "my log", "-", stdin=b"two\nthree\n")
    assert (group["first"], group["last"], len(group["digests"])) == (2, 3, 2)
    documents = {
        "append.json": group,
        "lookup.json": shell.json("lookup", "my log", "3", "--nonce", NONCE.hex()),
        "end.json": shell.json("end", "my log", "--nonce", NONCE.hex()),
        "truncate.json": shell.json("truncate", "my log", "3"),
    }
    assert bytes.fromhex(documents["lookup.json"]["payload"]) == b"three"
    elsewhere = Shell(shell.directory / "elsewhere")
    elsewhere.directory.mkdir()
    (elsewhere.directory / "log.pub").write_bytes((shell.directory / "my log" / "log.pub").read_bytes())
    for name, document in documents.items():
        verified = elsewhere.json("verify", "--key", "log.pub", save(elsewhere, name, document))
        assert verified["verified"] is True
        assert verified["log_id"] == created["log_id"]
        assert verified.get("fresh", False) is False
    fresh = elsewhere.json(
        "verify", "--key", "log.pub", "lookup.json", "--nonce", NONCE.hex(), "--index", "3", "--payload", "three"
    )
    assert (fresh["fresh"], fresh["outcome"]) == (True, "assigned")
    elsewhere("verify", "--key", "log.pub", "append.json", "--payload", "two", "--payload", "three")
    elsewhere.json("verify", "--key", "log.pub", "-", stdin=json.dumps(documents["end.json"]).encode())


def test_all_outcomes_are_answers(log):
    assert log.json("lookup", "my log", "2")["outcome"] == "assigned"
    unassigned = log.json("lookup", "my log", "4")
    assert (unassigned["outcome"], unassigned["digest"]) == ("unassigned", None)
    log("truncate", "my log", "3")
    assert log.json("lookup", "my log", "2")["outcome"] == "forgotten"
    assert log.json("lookup", "my log", "3")["outcome"] == "assigned"
    for name, index in (("u.json", "4"), ("f.json", "1")):
        save(log, name, log.json("lookup", "my log", index))
        log.json("verify", "--key", "my log/log.pub", name)


def verification_fails(shell, reason, *arguments):
    error = shell.json("verify", "--key", "my log/log.pub", *arguments, code=1)
    assert error["code"] == reason
    out, err = shell("verify", "--key", "my log/log.pub", *arguments, code=1)
    assert out == ""
    assert "\nhint: " in err


def test_an_old_answer_to_a_new_question(log):
    save(log, "lookup.json", log.json("lookup", "my log", "1", "--nonce", NONCE.hex()))
    save(log, "end.json", log.json("end", "my log", "--nonce", NONCE.hex()))
    for name in ("lookup.json", "end.json"):
        log("verify", "--key", "my log/log.pub", name, "--nonce", NONCE.hex())
        verification_fails(log, "wrong-nonce", name, "--nonce", OTHER_NONCE.hex())
    verification_fails(log, "wrong-range", "lookup.json", "--index", "2")
    verification_fails(log, "wrong-payload", "lookup.json", "--payload", "goodbye")


@pytest.mark.parametrize(
    ("reason", "command", "option"),
    [
        ("no-nonce", ["append", "x"], ["--nonce", NONCE.hex()]),
        ("no-nonce", ["truncate", "2"], ["--nonce", NONCE.hex()]),
        ("no-index", ["append", "x"], ["--index", "4"]),
        ("no-index", ["truncate", "2"], ["--index", "2"]),
        ("no-index", ["end"], ["--index", "3"]),
        ("no-payload", ["truncate", "2"], ["--payload", "x"]),
        ("no-payload", ["end"], ["--payload", "x"]),
    ],
)
def test_what_a_statement_cannot_prove_is_refused_not_ignored(log, reason, command, option):
    save(log, "said.json", log.json(command[0], "my log", *command[1:]))
    log("verify", "--key", "my log/log.pub", "said.json")
    verification_fails(log, reason, "said.json", *option)


def test_documents_that_were_changed(log):
    group = log.json("append", "my log", "-", stdin=b"x\ny\n")
    lookup = log.json("lookup", "my log", "1")
    attested = group["attestation"]
    statement = bytes.fromhex(attested["statement"])
    for reason, document in (
        ("wrong-document", group | {"first": 3}),
        ("wrong-document", lookup | {"outcome": "unassigned"}),
        ("wrong-payload", lookup | {"payload": b"goodbye".hex()}),
        ("wrong-head", group | {"digests": group["digests"][::-1]}),
        ("wrong-count", group | {"digests": group["digests"][:1]}),
        ("wrong-statement", group | {"attestation": {"statement": "00" * 170, "signature": attested["signature"]}}),
        ("wrong-log", group | {"attestation": attested | {"statement": flip(statement, 8 * 50).hex()}}),
        ("bad-signature", group | {"attestation": attested | {"signature": lookup["attestation"]["signature"]}}),
        ("malformed", group | {"attestation": attested | {"signature": "zz"}}),
        ("malformed", group | {"attestation": "x"}),
        ("malformed", group | {"digests": [1, 2]}),
        ("malformed", {key: group[key] for key in group if key != "digests"}),
        ("malformed", [group]),
    ):
        error = log.json("verify", "--key", "my log/log.pub", save(log, "changed.json", document), code=1)
        assert error["code"] == reason, error
    for text in ("", "{", '{"a": 1, "a": 2}', "[" * 100000, "\x00"):
        (log.directory / "broken.json").write_text(text)
        verification_fails(log, "malformed", "broken.json")


def test_another_logs_key(log):
    log("init", "other")
    save(log, "end.json", log.json("end", "my log"))
    error = log.json("verify", "--key", "other/log.pub", "end.json", code=1)
    assert error["code"] == "wrong-log"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("usage", ["bogus"]),
        ("usage", ["end"]),
        ("usage", ["lookup", "my log", "0"]),
        ("usage", ["lookup", "my log", "x"]),
        ("usage", ["lookup", "my log", str(2**64)]),
        ("usage", ["end", "my log", "--nonce", "12"]),
        ("usage", ["end", "my log", "--nonce", "zz" * 32]),
        ("usage", ["end", "my log", "--nonce", "0 " * 32]),
        ("usage", ["end", "my log", "--what"]),
        ("misuse", ["init", "my log"]),
        ("misuse", ["end", "no log"]),
        ("misuse", ["truncate", "my log", "9"]),
        ("misuse", ["append", "my log", "-"]),
        ("no-parent", ["init", "no/parent"]),
        ("os-error", ["verify", "--key", "my log/log.pub", "missing.json"]),
        ("os-error", ["verify", "--key", "missing.pub", "missing.json"]),
        ("os-error", ["verify", "--key", "my log/log.pub", "my log"]),
        ("bad-key", ["verify", "--key", "my log/seal.key", "my log/log.pub"]),
    ],
)
def test_wrong_use(log, code, arguments):
    assert log.json(*arguments, code=2)["code"] == code
    out, err = log(*arguments, code=2)
    assert out == ""
    assert err.startswith("error: ")


def test_a_group_beyond_the_limit(log):
    error = log.json("append", "my log", "-", stdin=b"x\n" * 1025, code=2)
    assert "split" in error["message"]
    assert log.json("end", "my log")["last"] == 3
    assert log.json("append", "my log", "-", stdin=b"x\n" * 1024)["last"] == 1027


def test_damage_is_refused_by_name(log):
    path = log.directory / "my log" / "log.state"
    data = path.read_bytes()
    path.write_bytes(flip(data, 8 * 600))
    error = log.json("end", "my log", code=1)
    assert error["code"] == "damaged"
    assert "log.state" in error["message"]
    assert "offset 512" in error["message"]
    assert "log.state" in log("append", "my log", "x", code=1)[1]


def test_readable_seal_key(log):
    (log.directory / "my log" / "seal.key").chmod(0o644)
    assert "chmod 600" in log.json("end", "my log", code=2)["message"]


def test_files_are_private(log):
    modes = {path.name: path.stat().st_mode & 0o777 for path in (log.directory / "my log").iterdir()}
    private = ["log.state", "seal.key", "entries.jsonl", "groups.jsonl"]
    assert modes == dict.fromkeys(private, 0o600) | {"log.pub": 0o644}


def test_control_characters_never_reach_the_terminal(log):
    log("append", "my log", "\x1b[31mred\u202e\x07 [bold]x")
    for output in ("plain", "table"):
        out, _ = log("lookup", "my log", "4", "-o", output)
        assert not {"\x1b", "\u202e", "\x07"} & set(out)
        assert "\\x1b[31mred\\u202e\\x07 [bold]x" in out
    out, err = log("end", "no\x1b[31m log", code=2)
    assert "\x1b" not in err


def test_payloads_need_not_be_text(log):
    log("append", "my log", "-", stdin=b"\xff\xfe\n\n")
    document = log.json("lookup", "my log", "4")
    assert document["payload"] == "fffe"
    log.json("verify", "--key", "my log/log.pub", save(log, "l.json", document))
    assert log.json("lookup", "my log", "5")["payload"] == ""
    assert "\\xff\\xfe" in log("lookup", "my log", "4")[0]


def test_plain_is_the_default_of_a_pipe(log):
    question = ["end", "my log", "--nonce", NONCE.hex()]
    assert log(*question) == log(*question, "-o", "plain")
    assert "last 3\n" in log(*question)[0]
    assert log(*question, "-o", "table") != log(*question)


def test_helps_have_examples(shell):
    for command in COMMANDS:
        out, _ = shell(command, "--help")
        assert "Example:\n    " in out
        assert "-o, --output [table|json|plain]" in out
    out, _ = shell("--help")
    assert all(f"  {command} " in out for command in COMMANDS)
    assert shell("--version")[0].splitlines()[0] == "trustlog 0.1.0"


def test_without_arguments_the_help_is_a_usage_error(shell):
    result = subprocess.run(PROGRAM, cwd=shell.directory, capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"Usage: trustlog" in result.stderr


def test_a_reader_that_goes_away(log):
    for output in ("plain", "table", "json"):
        command = [*PROGRAM, "end", "my log", "-o", output]
        with subprocess.Popen(command, cwd=log.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait() == 141


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["end log -o json", "end log -o table", "end log -o plain", "--help"])
def test_output_that_cannot_be_written(shell, arguments, redirection, unbuffered):
    shell("init", "log")
    line = f"{shlex.join(PROGRAM)} {arguments} {redirection}"
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=shell.directory,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: our output cannot be written: ")
    assert result.stderr.count("\n") == 2


def test_closed_standard_input_and_error(shell):
    shell("init", "log")
    for line, code in (("append log - <&-", 2), ("bogus 2>&-", 2), ("end log 2>&- <&-", 0)):
        command = f"{shlex.join(PROGRAM)} {line}"
        result = subprocess.run(["bash", "-c", command], cwd=shell.directory, capture_output=True, check=False)
        assert result.returncode == code
        assert b"Traceback" not in result.stderr


def test_a_failing_disk_says_that_nothing_unsaved_was_signed(log, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trustlog.cli.main.HostLog", full)
    monkeypatch.chdir(log.directory)
    with pytest.raises(SystemExit) as ended:
        run(cli, ["append", "my log", "x"])
    assert ended.value.code == 1
    assert "nothing unsaved was signed" in capsys.readouterr().err


# Two statements that contradict each other.


@pytest.fixture
def two_histories(shell, log):
    """The documents of one log that was copied and says index 4 twice."""
    shutil.copytree(shell.directory / "my log", shell.directory / "copy")
    texts = [shell("append", name, text, "-o", "json")[0] for name, text in (("my log", "here"), ("copy", "there"))]
    (shell.directory / "fork.json").write_text(json.dumps({"contradiction": [json.loads(text) for text in texts]}))
    return [json.loads(text) for text in texts]


def verify_fork(shell, *documents, code=0, key="my log/log.pub", more=()):
    (shell.directory / "f.json").write_text(json.dumps({"contradiction": list(documents)}))
    return shell.json("verify", "--key", key, "f.json", *more, code=code)


def test_two_histories_of_a_log_are_proof_against_it(shell, two_histories):
    said = verify_fork(shell, *two_histories)
    assert (said["verified"], said["statement"]) == (True, "contradiction")
    assert said["contradiction"].startswith("index 4 was attested twice")
    out, _ = shell("verify", "--key", "my log/log.pub", "fork.json")
    assert "contradiction index 4 was attested twice" in out


def test_what_does_not_contradict_is_no_proof(shell, two_histories):
    first, second = two_histories
    assert verify_fork(shell, first, first, code=1)["code"] == "no-contradiction"
    again = shell.json("append", "my log", "more")
    assert verify_fork(shell, first, again, code=1)["code"] == "no-contradiction", "neighbours that meet"
    for documents in ((), (first,), (first, second, second), (first, 5)):
        assert verify_fork(shell, *documents, code=1)["code"] == "malformed"
    assert verify_fork(shell, {**first, "last": 5}, second, code=1)["code"] == "wrong-document"
    shell("init", "other")
    assert verify_fork(shell, first, second, code=1, key="other/log.pub")["code"] == "wrong-log"
    for more in (("--nonce", NONCE.hex()), ("--index", "4"), ("--payload", "here")):
        assert verify_fork(shell, first, second, code=1, more=more)["code"] == "wrong-document"
    forged = json.loads(json.dumps(second).replace(second["attestation"]["signature"], "11" * 64))
    assert verify_fork(shell, first, forged, code=1)["code"] == "bad-signature"
