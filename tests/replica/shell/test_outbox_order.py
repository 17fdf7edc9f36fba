"""No entry leaves a replica before it is durable and attested: by the program's structure, and as recorded."""

import ast
import random
import typing
from pathlib import Path

import pytest

from replica.shell import outbox as outbox_module
from replica.shell.outbox import Outbox, ReleasedGroup
from replica.shell.store import own_group
from replica.shell.streams import Streams
from replica.wire.messages import GroupMessage
from tests.replica.shell.outbox_bench import Author, Bench, check_order, turns
from tests.support.waiting import on_loop, until

REPLICA = Path(outbox_module.__file__).resolve().parents[1]


def doors(source: str) -> list[str]:
    """Name what a source does that only one module may do."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
            if name in {"ReleasedGroup", "GroupMessage"}:
                found.append(name)
            # A list's append takes no keyword, the trusted log's needs one.
            elif name == "append" and node.keywords:
                found.append("trusted append")
            elif name == "getattr" and len(node.args) > 1 and not isinstance(node.args[1], ast.Constant):
                found.append("computed attribute")
            elif name in {"getattr", "methodcaller", "attrgetter"}:
                found += ["trusted append"] if any(getattr(a, "value", None) == "append" for a in node.args) else []
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        # A method taken as a value could be called under another name.
        if isinstance(node, ast.Attribute) and node.attr == "append" and id(node) not in calls:
            found.append("append as a value")
        if isinstance(node, ast.alias) and node.name in {"ReleasedGroup", "GroupMessage"} and node.asname:
            found.append("renamed")
    return found


def test_one_module_has_entries_attested_and_releases_them():
    # The simulator models faulty replicas and has logs of its own; no daemon imports it.
    files = [path for path in sorted(REPLICA.rglob("*.py")) if "sim" not in path.relative_to(REPLICA).parts]
    found = {str(path.relative_to(REPLICA)): doors(path.read_text()) for path in files}
    for name, what in found.items():
        if not name.startswith(("shell/", "wire/")):  # others go through the fields of dataclasses
            found[name] = [one for one in what if one != "computed attribute"]
    assert {name: set(what) for name, what in found.items() if what} == {
        "shell/outbox.py": {"ReleasedGroup", "trusted append"},
        "shell/processlog.py": {"trusted append"},  # the log itself, which hands the outbox's call on to its service
        "shell/streams.py": {"GroupMessage"},
    }
    assert sorted(found["shell/outbox.py"]) == ["ReleasedGroup", "trusted append"]
    assert found["shell/processlog.py"] == ["trusted append"]


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        ("self._log.append(d, context=c)", "trusted append"),
        ("log.append(d, **{'context': c})", "trusted append"),
        ("getattr(log, 'append')(d)", "trusted append"),
        ("getattr(log, name)(d)", "computed attribute"),
        ("say = log.append", "append as a value"),
        ("outbox.ReleasedGroup(g)", "ReleasedGroup"),
        ("from x import ReleasedGroup as R", "renamed"),
        ("connection.send(GroupMessage(0, raw))", "GroupMessage"),
        ("things.append(1)", None),
    ],
)
def test_a_second_door_is_found(planted, what):
    assert doors(planted) == ([what] if what else [])


def test_readers_are_given_released_groups_only():
    assert typing.get_type_hints(Streams.publish)["released"] is ReleasedGroup
    callback = typing.get_type_hints(Outbox.__init__)["on_released"]
    assert typing.get_args(callback)[0] == [ReleasedGroup]
    assert GroupMessage._fields == ("log", "group")


async def converse(bench: Bench, seed: int) -> None:
    """Receive and append in a random order, on and between turns of the loop."""
    chance = random.Random(seed)
    asked = 0
    for step in range(60):
        if chance.random() < 0.6:
            bench.receive(chance.choice([1, 2]), *(b"%d" % step for _ in range(chance.randint(1, 3))))
        if chance.random() < 0.5 and bench.outbox._to_say is None:
            bench.append(*(chance.randbytes(20) for _ in range(chance.randint(1, 4))))
            asked += 1
        if chance.random() < 0.4:
            await until(lambda: not bench.outbox.is_busy or bench.failed, "the outbox idle")
        await turns(chance.randint(0, 3))
    await until(lambda: bench.outbox._to_say is None and len(bench.released) >= asked, "everything said")


@pytest.mark.parametrize("seed", range(4))
@on_loop
async def test_durable_then_attested_then_released(tmp_path, seed):
    async with Bench(tmp_path) as bench:
        await converse(bench, seed)
        assert check_order(bench.steps) >= 5
        assert not bench.failed
        groups = [released.group for released in bench.released]
    assert [g.first for g in groups] == [1, *(g.last + 1 for g in groups[:-1])]


class AttestsFirst(Outbox):
    """Has a group attested, then makes it durable."""

    def _speak(self, received, unstored, payloads):
        if payloads is None:
            return super()._speak(received, unstored, payloads)
        write, self._store.write = self._store.write, lambda *_: None
        try:
            released = super()._speak(received, unstored, payloads)
        finally:
            self._store.write = write
        write(received, unstored, own_group(self._number, released.group.first, payloads))
        return released


class ForgetsCauses(Outbox):
    """Stores own payloads at once, what was received later."""

    def _start(self):
        received, self._received = self._received, {}
        super()._start()
        self._received = received


class ReleasesEarly(Outbox):
    """Releases a group when it is asked for, with an attestation made up."""

    def append(self, payloads):
        self._on_released(ReleasedGroup(Author(0).say(*payloads)))
        super().append(payloads)


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        (AttestsFirst, "before its payloads were durable"),
        (ForgetsCauses, "before its causes"),
        (ReleasesEarly, "released before it was attested|list index out of range"),
    ],
)
@on_loop
async def test_the_check_finds_a_swapped_order(tmp_path, broken, finding):
    async with Bench(tmp_path, broken) as bench:
        await converse(bench, 1)
        with pytest.raises((AssertionError, IndexError), match=finding):
            check_order(bench.steps)
