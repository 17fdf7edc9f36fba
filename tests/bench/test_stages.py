"""Sampled stacks are told apart by what the replica was doing."""

import pytest

from tests.bench import stages
from tests.bench.profiling import shortened
from tests.bench.report import ROOT
from tests.bench.stages import LOOP, RULES, STAGES, hottest, parse, shares, stage_of

LOOP_FRAMES = ["<module> (replica/cli/main.py:9)", "Runner.run (asyncio/runners.py:118)"]
DRAIN = [*LOOP_FRAMES, "Node._drain (/somewhere else/replica/shell/node.py:371)"]


READING = [*LOOP_FRAMES, "MessageProtocol._read_frames (replica/wire/frames.py:150)"]
CORE = [*DRAIN, "ReplicaCore.handle (replica/core/machine.py:200)"]
THREAD = ["_worker (concurrent/futures/thread.py:83)"]
SPEAK = "Outbox._speak (replica/shell/outbox.py)"


@pytest.mark.parametrize(
    ("frames", "stage"),
    [
        (LOOP_FRAMES, LOOP),
        (CORE, stages.ORDER),
        ([*CORE, "Executor._apply (x/replica/core/execution.py)"], stages.EXECUTE),
        ([*DRAIN, "encode_operations_reply (replica/core/envelope.py:3)", "pack (struct.py:1)"], stages.REPLY),
        (
            [*LOOP_FRAMES, "MessageProtocol._flush (replica/wire/frames.py:190)", "SSLObject.write (ssl.py:1)"],
            stages.SEND,
        ),
        (READING, stages.READ),
        ([*READING, "verify (replica/shell/verify.py)"], stages.VERIFY),
        ([*THREAD, SPEAK, "transaction (replica/shell/sqlitefile.py:3)"], stages.STORE),
        ([*THREAD, "RemoteLog._receive (trustlog/service/client.py:3)"], stages.ATTEST),
        (
            ["Outbox._start (replica/shell/outbox.py)", "ThreadPoolExecutor.submit (concurrent/futures/thread.py:1)"],
            stages.WAKE,
        ),
        (["no frame at all"], LOOP),
        # The end of a name is not the name.
        (["run (my_replica/core.py:1)", "f (other/xreplica/shell/store.py)"], LOOP),
    ],
)
def test_the_innermost_frame_that_has_a_rule_decides(frames, stage):
    assert stage_of(frames) == stage


def test_every_rule_names_a_file_that_there_is():
    own = [(path, functions) for _, path, functions in RULES if path.startswith(("replica/", "trustlog/"))]
    assert len(own) > 20
    for path, functions in own:
        place = ROOT / path
        assert place.is_dir() if path.endswith("/") else place.is_file(), path
        for name in functions:
            assert f"def {name}(" in place.read_text(), f"{path} has no {name}"


def test_shares_add_up_and_lines_of_a_function_are_one_place():
    lines = [
        ";".join([*DRAIN, "handle (replica/core/machine.py:200)"]) + " 3\n",
        ";".join([*DRAIN, "handle (replica/core/machine.py:201)"]) + " 2\n",
        "\n",
        " 7\n",  # a stack that changed while it was read
        ";".join(LOOP_FRAMES) + " 5\n",
    ]
    samples = parse(lines)
    found = shares(samples)
    assert found[stages.ORDER] == found[LOOP] == 0.5
    assert set(found) == set(STAGES)
    assert sum(found.values()) == 1.0
    assert hottest(samples, 1) == [("handle (replica/core/machine.py)", 0.5)]


def test_what_is_no_recording_is_refused():
    for line in ("handle (replica/core/machine.py:200)", "12", "a b c"):
        with pytest.raises(ValueError, match="line 1 is no stack"):
            parse([line])
    with pytest.raises(ValueError, match="nothing was sampled"):
        shares([])


def test_places_are_named_from_the_package_on():
    assert shortened(f"f ({ROOT}/replica/core/machine.py)") == "f (replica/core/machine.py)"
    assert shortened("f (/usr/lib/python3.11/asyncio/runners.py)") == "f (asyncio/runners.py)"
    assert shortened("f (/x/lib/python3.11/site-packages/click/core.py)") == "f (click/core.py)"
