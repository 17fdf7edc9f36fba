"""The children of `trustlog-replica dev`: real processes, but stand-ins for replicas."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from replica.cli import dev
from replica.cli.dev import ChildCommand, Screen, run_children
from replica.cli.main import main
from replica.cluster.clusterfile import load_cluster_file
from replica.core.genesis import Ordering
from tests.replica.cluster.support import make_cluster
from trustlog.cli.contract import CommandError, Exit

# Says "ready" and ends, with its farewell, on SIGTERM.
OBEDIENT = """
import signal, sys
signal.alarm(60)  # should the test itself fail, nothing is left behind
def end(*_):
    print("bye"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready")
while True: signal.pause()
"""
STUBBORN = """
import signal
signal.alarm(60)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready")
while True: signal.pause()
"""


class Recorder(Screen):
    """Keeps what was shown, and calls `on_line` for each line."""

    def __init__(self, on_line=lambda _label, _text: None):
        super().__init__(as_json=False)
        self.lines, self.ends, self.notes, self.on_line = [], [], [], on_line

    def line(self, number, label, text):
        self.lines.append((label, text))
        self.on_line(label, text)

    def ended(self, label, status, *, expected):
        self.ends.append((label, status, expected))

    def note(self, text):
        self.notes.append(text)


def child(label, program):
    return ChildCommand(label, (sys.executable, "-c", program))


def run(children, screen, stop, **options):
    async def main():
        return await asyncio.wait_for(run_children(children, screen, stop, **options), 60)

    return asyncio.run(main())


def stop_when_ready(count):
    stop = asyncio.Event()
    seen = []

    def on_line(label, text):
        if text == "ready":
            seen.append(label)
            if len(seen) == count:
                stop.set()

    return Recorder(on_line), stop


def test_stop_ends_all_children_by_sigterm():
    screen, stop = stop_when_ready(3)
    assert run([child(f"c{i}", OBEDIENT) for i in range(3)], screen, stop) is True
    assert sorted(screen.ends) == [(f"c{i}", "exited with status 0", True) for i in range(3)]
    assert [text for _, text in screen.lines].count("bye") == 3
    assert not screen.notes


def test_stubborn_child_is_killed_after_the_deadline():
    screen, stop = stop_when_ready(2)
    children = [child("good", OBEDIENT), child("bad", STUBBORN)]
    assert run(children, screen, stop, stop_seconds=0.3) is True
    assert sorted(screen.ends) == [("bad", "was killed by SIGKILL", True), ("good", "exited with status 0", True)]
    assert "1 did not end" in screen.notes[0]


def test_a_child_that_ends_by_itself_is_announced_and_not_restarted():
    screen, stop = stop_when_ready(1)
    children = [child("dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]
    assert run(children, screen, stop) is False
    assert screen.ends == [("dies", "was killed by SIGKILL", False)]


def test_the_others_go_on_when_one_dies():
    stop = asyncio.Event()
    screen = Recorder()
    real_ended = screen.ended

    def ended(label, status, *, expected):
        real_ended(label, status, expected=expected)
        if label == "dies":
            stop.set()

    screen.ended = ended
    children = [child("dies", "raise SystemExit(3)"), child("lives", OBEDIENT)]
    assert run(children, screen, stop) is True
    assert screen.ends[0] == ("dies", "exited with status 3", False)
    assert screen.ends[1][0] == "lives"


def test_child_that_cannot_be_started_ends_the_others():
    screen = Recorder()
    children = [child("good", STUBBORN), ChildCommand("none", ("/nonexistent/program",))]
    with pytest.raises(CommandError, match="none cannot be started"):
        run(children, screen, asyncio.Event(), stop_seconds=0.1)
    assert [label for label, *_ in screen.ends] == ["good"]


def test_lines_are_cut_bounded_and_never_lost():
    program = "import sys; sys.stdout.write('a' * 200_000 + chr(10) + 'second' + chr(13) + chr(10) + 'no newline')"
    screen = Recorder()
    run([child("c", program)], screen, asyncio.Event())
    texts = [text for _, text in screen.lines]
    assert texts[-2:] == ["second", "no newline"]
    assert "".join(texts[:-2]) == "a" * 200_000
    assert max(map(len, texts)) < 2 * dev.LINE_BYTES_MAX


def test_control_characters_of_a_child_are_escaped(capsys):
    program = r"import sys; sys.stdout.buffer.write(b'\x1b[2Jx\x07\xff\n')"
    run([child("c", program)], Screen(as_json=False), asyncio.Event())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "c | \\x1b[2Jx\\x07" in out
    assert "*** c exited with status 0 by itself" in out


def test_colour_only_on_a_terminal_and_not_with_no_color(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[" in Screen(as_json=False)._styled("c", 0)
    assert Screen(as_json=True)._styled("c", 0) == "c"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(as_json=False)._styled("c", 0) == "c"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert Screen(as_json=False)._styled("c", 0) == "c"


def test_json_is_one_document_per_line(capsys, tmp_path):
    screen = Screen(as_json=True)
    directory = make_cluster(tmp_path / "c")
    screen.banner(directory, dev.load_any_cluster_file(directory), temporary=False)
    run([child("c", "print('x')")], screen, asyncio.Event())
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [document["event"] for document in shown] == ["started", "log", "ended"]
    assert shown[1]["line"] == "x"
    assert not shown[2]["expected"]


@pytest.fixture
def stand_ins(monkeypatch):
    """Replicas are replaced by programs; returns the function that says which."""

    def replace(program):
        monkeypatch.setattr(
            dev, "_replica_command", lambda _directory, number, **_: child(f"replica-{number}", program)
        )

    return replace


def start(directory, **options):
    settings = {"f": 1, "base_port": 0, "ordering": Ordering.THREE_PHASE, "application": "m:C", "as_json": False}
    return dev.run_development_cluster(directory, **{**settings, **options})


def test_new_directory_is_made_and_used_again(stand_ins, tmp_path, capsys):
    stand_ins("raise SystemExit(1)")
    assert start(tmp_path / "c d") is Exit.NEGATIVE
    made = (tmp_path / "c d" / "cluster.toml").read_bytes()
    assert f"-c '{tmp_path / 'c d'}' exec" in capsys.readouterr().out
    assert start(tmp_path / "c d") is Exit.NEGATIVE
    assert (tmp_path / "c d" / "cluster.toml").read_bytes() == made


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("--f", "2", "--f 1, not 2"),
        ("--ordering", "two-phase", "--ordering three-phase, not two-phase"),
        ("--app", "replica.apps.counter:Counter", "--app replica.apps.kv:KeyValue, not replica.apps.counter:Counter"),
        ("--base-port", "7200", "--base-port 7100, not 7200"),
    ],
)
def test_an_existing_cluster_is_not_run_under_other_options(stand_ins, tmp_path, capsys, option, value, found):
    stand_ins("raise SystemExit(1)")
    directory = make_cluster(tmp_path / "c")
    with pytest.raises(SystemExit) as ended:
        main(["dev", str(directory), option, value])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert found in err
    assert f"leave {option} out" in err


def test_an_existing_cluster_is_run_under_its_own_options_and_the_defaults(stand_ins, tmp_path, capsys):
    stand_ins("raise SystemExit(1)")
    directory = make_cluster(tmp_path / "c", f=2, ordering=Ordering.TWO_PHASE)
    for options in ([], ["--f", "2", "--ordering", "two-phase", "--base-port", "7100"], ["--base-port", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(["dev", str(directory), *options])
        assert ended.value.code == 1
        assert "5 replicas, f = 2, two-phase" in capsys.readouterr().out


def test_the_banner_fits_the_application(stand_ins, tmp_path, capsys):
    stand_ins("raise SystemExit(1)")
    start(tmp_path / "kv", application="replica.apps.kv:KeyValue")
    out = capsys.readouterr().out
    assert "put greeting hello" in out
    assert "exec" not in out
    start(tmp_path / "other", application="votes:Votes")
    out = capsys.readouterr().out
    assert "exec OPERATION" in out
    assert "put greeting" not in out


def test_a_killed_child_was_not_killed_by_itself(capsys):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run([child("c", program)], Screen(as_json=False), asyncio.Event())
    assert "*** c was killed by SIGKILL, and is not started again ***" in capsys.readouterr().out


def test_temporary_directory_is_kept_when_all_replicas_died(stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dev.tempfile, "tempdir", str(tmp_path))
    stand_ins("raise SystemExit(1)")
    assert start(None) is Exit.NEGATIVE
    out = capsys.readouterr().out
    assert "temporary: removed at the end" in out
    (kept,) = tmp_path.glob("trustlog-dev-*/cluster/cluster.toml")
    assert f"{kept.parent} is kept" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_status_0(number, tmp_path):
    """The program as a user starts it; the replicas are the stand-ins above."""
    program = f"""
import sys
from pathlib import Path
from replica.cli import dev
from replica.cli.main import main
dev._replica_command = lambda directory, number, **_: dev.ChildCommand(
    f"replica-{{number}}", (sys.executable, "-c", {OBEDIENT!r}))
main(["dev"])
"""
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    ) as process:
        seen = []
        ready = 0
        try:
            for line in process.stdout:
                seen.append(line)
                ready += line.rstrip().endswith("| ready")
                if ready == 3:
                    # To the whole group, as a terminal does; the children are not in it.
                    os.killpg(process.pid, number)
                    ready = -100
            assert process.wait(30) == 0, seen
        finally:
            process.kill()
    text = "".join(seen)
    assert text.count("| bye") == 3
    assert "by itself" not in text
    assert "Traceback" not in text
    assert "temporary: removed at the end" in text
    assert list(tmp_path.iterdir()) == []


def test_reader_that_goes_away_ends_it(tmp_path):
    chatty = "import itertools, signal\nsignal.alarm(60)\nfor i in itertools.count(): print('x' * 1000, i)"
    program = f"""
import sys
from pathlib import Path
from replica.cli import dev
from replica.cli.main import main
dev._replica_command = lambda directory, number, **_: dev.ChildCommand(
    f"replica-{{number}}", (sys.executable, "-c", {chatty!r}))
main(["dev", {str(tmp_path / "c")!r}])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(30) == 141
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_http_ports_follow_each_other(tmp_path, capsys):
    cluster = load_cluster_file(make_cluster(tmp_path / "c"))
    Screen(as_json=False).banner(tmp_path / "c", cluster, temporary=False, http_base_port=8100)
    assert "curl http://127.0.0.1:8100/status" in capsys.readouterr().out
    for number in range(3):
        command = dev._replica_command(Path("c") / f"replica-{number}", number, as_json=False, http_base_port=8100)
        at = command.arguments.index("--http")
        assert command.arguments[at + 1] == f"127.0.0.1:{8100 + number}"
    assert "--http" not in dev._replica_command(Path("c") / "replica-0", 0, as_json=False).arguments


def test_whoever_is_a_member_is_started_whatever_its_folder_is_called(tmp_path):
    home = tmp_path / "c"
    cluster = load_cluster_file(make_cluster(home))
    make_cluster(tmp_path / "another")
    assert [dev.member_folder(home, cluster, number) for number in range(3)] == [
        home / f"replica-{i}" for i in range(3)
    ]
    (home / "replica-2").rename(home / "a new disk")
    assert dev.member_folder(home, cluster, 2) == home / "a new disk"
    # What has the usual name, and is no member's.
    (tmp_path / "another" / "replica-2").rename(home / "replica-2")
    assert dev.member_folder(home, cluster, 2) == home / "a new disk"
    (home / "a new disk" / "replica.toml").write_text("nothing")
    assert dev.member_folder(home, cluster, 2) == home / "replica-2", "who starts it is told what is wrong"
