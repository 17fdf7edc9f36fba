"""Evidence in a running cluster: kept durably, within bounds, verified offline; and a fork that nobody saw whole."""

import json
import re
import stat
from collections import Counter
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import structlog

from replica.cli.main import main as replica_main
from replica.cluster.memberlists import encode_place, load_present_cluster, members_path, seat_of, write_links
from replica.core.chain import Link
from replica.core.checkpoint import Header, encode_certificate
from replica.core.entries import Checkpoint, Prepare, SlotResult, Suspect
from replica.core.events import Exposed, Forked
from replica.core.evidence import Basis
from replica.core.genesis import Member
from replica.core.group import encode_group, encode_payloads
from replica.core.layout import LayoutError
from replica.core.members import MemberList, Seat
from replica.core.proof import prove
from replica.core.proving import UnprovenError, examine_under
from replica.core.rules import Violation
from replica.shell import detector, evidence
from replica.shell.atrest import CLEAR
from replica.shell.evidence import EvidenceFolder
from replica.shell.store import Store, StoredGroup
from replica.shell.verify import GroupVerifier
from replica.wire.messages import GroupMessage
from tests.replica.core.evidence_world import KeyedLog, World, signed_envelope
from tests.replica.core.harness import make_genesis
from tests.replica.core.test_chain import Ending
from tests.replica.core.test_members import OPERATOR
from tests.replica.core.test_proving_lists import joining
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from trustlog import Attestation, AttestedLog, LogState, entry_digest, in_memory, log_id, open_log
from trustlog.cli.contract import run as run_program
from trustlog.cli.main import cli as trustlog_cli

LIAR = 2


class ForgetfulStore:
    def save(self, state):
        """Keep nothing."""


class Stage:
    """Three replicas after some operations; the last one stops, and its log is the test's."""

    def __init__(self, path) -> None:
        self.cluster = Nodes(path / "c")
        self.context = self.cluster.cluster.genesis.context()
        self.log_name = log_id(self.cluster.cluster.genesis.members[LIAR].log_public_key).hex()[:16]

    async def __aenter__(self):
        self.cluster.start()
        await self.cluster.wait_ready()
        async with self.cluster.client() as client:
            for number in range(5):
                await client.put("k", str(number))
            await self.cluster.wait_equal()
        await self.cluster.wait_quiet()
        await self.cluster.stop(LIAR)
        self.log = open_log(self.cluster.folder(LIAR) / "log")
        return self

    async def __aexit__(self, *exception):
        self.log.close()
        await self.cluster.__aexit__(*exception)

    def say(self, *entries, log=None) -> bytes:
        payloads = [entry if isinstance(entry, bytes) else entry.encode() for entry in entries]
        attestation = (log or self.log).append([entry_digest(p) for p in payloads], context=self.context)
        return encode_group(attestation, encode_payloads(tuple(payloads)))

    def deliver(self, raw: bytes, *numbers: int) -> None:
        for number in numbers or (0, 1):
            self.cluster.nodes[number].on_group(GroupMessage(LIAR, raw), LIAR)

    def folder(self, number: int):
        return self.cluster.folder(number) / "evidence"

    async def kept(self, number: int, count: int = 1):
        def there():
            files = EvidenceFolder(self.folder(number)).files()
            return files if len(files) >= count else None

        try:
            return await until(there, f"{count} files of evidence at replica {number}")
        except AssertionError:
            print(*self.cluster.logged.texts()[-12:], sep="\n")
            raise

    def verdict(self, number: int) -> dict:
        report = json.loads(self.cluster.nodes[number].status_json())
        assert [one["replica"] for one in report["verdicts"]] == [0, 1, 2]
        assert {one["verdict"] for one in report["verdicts"][:2]} == {"trusted"}
        return report["verdicts"][LIAR]


def program(main, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def verify(stage, capsys, file, *more):
    """`trustlog-replica evidence verify`, with the cluster file alone."""
    arguments = ("evidence", "verify", file, "--cluster", stage.cluster.directory / "cluster.toml", *more)
    return program(replica_main, capsys, *arguments)


@pytest.mark.parametrize(
    ("entries", "rule"),
    [
        ([b"\x09junk"], "malformed"),
        ([Suspect(0), Suspect(0)], "suspected-twice"),
        ([Prepare(0, 100, bytes(32))], "slot-skipped"),
        ([SlotResult(1_000_000, 1, bytes(32))], "result-beyond-window"),
    ],
)
@on_loop
async def test_a_rule_broken_is_kept_verified_and_still_there_after_a_restart(tmp_path, capsys, entries, rule):
    async with Stage(tmp_path) as stage:
        stage.deliver(stage.say(*entries))
        (file,), _ = await stage.kept(0), await stage.kept(1)
        index = stage.log.last
        assert file.name == f"log-2-{stage.log_name}-entry-{index}-{rule}.evidence"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        code, out, err = verify(stage, capsys, file)
        assert (code, err) == (0, "")
        assert out.startswith(f"log 2 of replica 2 broke rule {rule} at index {index}: ")
        code, out, _ = verify(stage, capsys, file, "-o", "json")
        document = json.loads(out)
        assert (document["schema_version"], document["proven"], document["log"]) == (1, True, 2)
        assert (document["rule"], document["index"]) == (rule, index)
        assert (document["log_id"], document["lists"]) == (stage.log.log_id.hex(), [0])
        await until(lambda: stage.cluster.nodes[0].detector.keeper.names, "it is listed")
        said = stage.verdict(0)
        assert (said["verdict"], said["reason"], said["index"]) == ("exposed", rule, index)
        assert said["evidence"] == [file.name]
        before = file.read_bytes(), file.stat().st_mtime_ns
        await stage.cluster.stop(0)
        stage.cluster.start(0)
        await until(lambda: stage.verdict(0)["verdict"] == "exposed", "found again when the store is read")
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
        await until(lambda: stage.verdict(0)["evidence"] == [file.name], "the file listed")


def replaced(stage) -> Link:
    """Return what shows that the liar was replaced by a new log after the first milestone, attested by the others."""
    cluster = stage.cluster.cluster
    genesis, slot = cluster.genesis, cluster.genesis.limits.checkpoint_interval
    new = Seat(Member(LIAR, 1, in_memory().public_key, b"", 1), encode_place(cluster.replicas[LIAR]))
    members = MemberList(1, slot, (seat_of(cluster, 0), seat_of(cluster, 1), new))
    digests = (b"l" * 32,) * 3
    header = Header(slot, 5, b"a" * 32, b"t" * 32, (1, 1, 1), digests, digests, 0, members.digest)
    proofs = {}
    for number in (0, 1):
        with closing(open_log(stage.cluster.folder(number) / "log")) as log:
            raw = stage.say(Checkpoint(slot, header.digest), log=log)
        group = GroupVerifier(genesis).verify(number, raw)
        proofs[number] = prove(group, group.first)
    return Link(header.encode(), encode_certificate(proofs), members.encode())


@pytest.mark.parametrize("entries", [[b"\x09junk"], [Suspect(0), Suspect(0)]])
@on_loop
async def test_what_was_proven_is_proven_when_that_replica_was_replaced(tmp_path, capsys, entries):
    async with Stage(tmp_path) as stage:
        stage.deliver(stage.say(*entries))
        (file,), _ = await stage.kept(0), await stage.kept(1)
        before = verify(stage, capsys, file)
        for number in (0, 1):
            await stage.cluster.stop(number)
        path = stage.cluster.directory / "cluster.toml"
        write_links(members_path(path), [replaced(stage).encode()])
        present = load_present_cluster(path)
        assert [ends for _, ends in present.spans] == [present.genesis.base, None]
        assert present.genesis.members[LIAR] != present.lists[0].members[LIAR]
        code, out, err = verify(stage, capsys, file)
        said = f"; log id {stage.log.log_id.hex()}, a member "
        assert before == (0, out.replace(f"{said}of list 0 and of none since", f"{said}since list 0"), err)
        assert code == 0
        assert f"{said}of list 0 and of none since" in out


@on_loop
async def test_a_lie_is_kept_too(tmp_path, capsys):
    async with Stage(tmp_path) as stage:
        slot = stage.cluster.nodes[0].core.executed + 1
        async with stage.cluster.client() as client:
            await client.put("k", "more")
        stage.deliver(stage.say(Prepare(0, slot, b"\7" * 32)))
        (file,) = await stage.kept(0)
        assert file.name.endswith("-false-vote.evidence")
        code, out, _ = verify(stage, capsys, file)
        assert code == 0
        assert "broke rule false-vote" in out
        assert stage.verdict(0)["verdict"] == "trusted", "a lie is not counted, and stops nobody's log"
        await until(lambda: stage.verdict(0)["evidence"] == [file.name], "the file listed")


@on_loop
async def test_refusals_name_the_reason(tmp_path, capsys):
    async with Stage(tmp_path) as stage:
        stage.deliver(stage.say(Suspect(0), Suspect(0)))
        (file,) = await stage.kept(0)
        raw = file.read_bytes()
        forged = tmp_path / "forged"
        for content in (raw[:-1], raw[:40], b"", b"{}", b"{", raw[:-30] + bytes([raw[-30] ^ 1]) + raw[-29:]):
            forged.write_bytes(content)
            code, out, err = verify(stage, capsys, forged)
            assert (code, out) == (1, "")
            assert err.startswith("error: proves nothing: ")
        code, out, _ = verify(stage, capsys, forged, "-o", "json")
        assert (code, json.loads(out)["error"]["code"]) == (1, "not-proven")
        other = Nodes(tmp_path / "other")
        arguments = ("evidence", "verify", file, "--cluster", other.directory / "cluster.toml")
        code, _, err = program(replica_main, capsys, *arguments)
        assert code == 1
        assert "another cluster" in err
        assert verify(stage, capsys, tmp_path / "none")[0] == 2


@on_loop
async def test_a_false_result_is_kept_as_what_was_said(tmp_path, capsys):
    """It is reported by whoever executed the slot, proves no fault by itself, and the log is read on."""
    async with Stage(tmp_path) as stage:
        async with stage.cluster.client() as client:
            _, receipt = await client.with_receipt(lambda calls: calls.put("k", "v"))
        stage.deliver(stage.say(SlotResult(receipt.outcome.slot, receipt.size, bytes(32))), 0)
        (file,) = await stage.kept(0)
        assert file.name == f"log-2-{stage.log_name}-entry-{stage.log.last}-false-result.evidence"
        code, out, err = verify(stage, capsys, file)
        assert (code, out) == (1, "")
        assert "not self-contained" in err
        assert stage.verdict(0)["verdict"] != "exposed"
        assert stage.cluster.nodes[0].core.read(LIAR) == stage.log.last


@on_loop
async def test_a_fork_shown_in_halves_is_noticed_by_heads(tmp_path, capsys, monkeypatch):
    """Replica 0 sees one history, replica 1 another. Each is good by itself; what they say of the ends is not."""
    async with Stage(tmp_path) as stage:
        log = stage.log
        state = LogState(**{name: getattr(log._state, name) for name in log._state.__dataclass_fields__})
        clone = AttestedLog(log._private_key, log.kind, state, ForgetfulStore())
        stage.deliver(stage.say(Suspect(0)), 0)
        stage.deliver(stage.say(Checkpoint(128, bytes(32)), log=clone), 1)
        (one,), (other,) = await stage.kept(0), await stage.kept(1)
        assert one.name == other.name == f"log-2-{stage.log_name}-fork.json"
        key = stage.cluster.folder(LIAR) / "log" / "log.pub"
        run_trustlog = lambda arguments: run_program(trustlog_cli, arguments)  # noqa: E731
        for file in (one, other):
            code, out, err = program(run_trustlog, capsys, "verify", "--key", key, file)
            assert (code, err) == (0, "")
            assert "contradiction index" in out
            assert "attested twice" in out
            code, out, _ = verify(stage, capsys, file)
            assert code == 0
            assert out.startswith("log 2 of replica 2 attested two histories")
        foreign = stage.cluster.folder(0) / "log" / "log.pub"
        assert program(run_trustlog, capsys, "verify", "--key", foreign, one)[0] == 1
        assert stage.verdict(0)["verdict"] == stage.verdict(1)["verdict"] == "broken"
        await stage.cluster.stop(0)
        stage.cluster.start(0)
        await until(lambda: stage.cluster.nodes[0].core.is_live, "replica 0 back")
        assert stage.verdict(0)["verdict"] == "broken", "the store holds one history only; the evidence says the rest"
        received = stage.cluster.nodes[0].core.received(LIAR)
        stage.deliver(stage.say(Suspect(1)), 0)
        assert stage.cluster.nodes[0].core.received(LIAR) == received
        code, out, _ = program(replica_main, capsys, "evidence", "list", stage.cluster.folder(0))
        assert (code, out) == (0, f"2 forked - fork {one}\n")


@on_loop
async def test_what_would_be_too_large_is_kept_as_what_was_said(tmp_path, capsys, monkeypatch):
    from replica.core import proving

    monkeypatch.setattr(proving, "EVIDENCE_BYTES_MAX", 1000)
    async with Stage(tmp_path) as stage:
        stage.deliver(stage.say(Prepare(0, 100, bytes(32))))
        (file,) = await stage.kept(0)
        code, out, err = verify(stage, capsys, file)
        assert (code, out) == (1, "")
        assert "not self-contained" in err
        code, out, _ = program(replica_main, capsys, "evidence", "list", stage.cluster.folder(0), "-o", "json")
        (listed,) = json.loads(out)["evidence"]
        assert (listed["kind"], listed["rule"]) == ("bare", "slot-skipped")


def test_the_last_milestone_of_the_list_before_is_no_basis(tmp_path, monkeypatch):
    """It is of as many logs as the members were then, and those who read under the next list began anew at it."""
    ending = Ending(f=2)
    stayed = MemberList(1, ending.header.slot, ending.members.seats[:3])
    header = replace(ending.header, members=stayed.digest)
    genesis = stayed.genesis(ending.genesis)
    held = SimpleNamespace(exists=True, header=header.encode(), certificate=b"c", logs=(b"l",), close=lambda: None)
    monkeypatch.setattr(evidence, "PinnedState", lambda *_: held)
    path = tmp_path / "state"
    path.touch()
    collector = evidence.Collector(path, path, genesis, before=ending.genesis)
    assert collector._basis() == (None, (1, 1, 1))
    held.header = replace(header, cut=(7, 8, 9), heads=header.heads[:3], logs=header.logs[:3], list_number=1).encode()
    assert collector._basis() == (Basis(held.header, b"c", (b"l",)), (8, 9, 10))
    held.header = header.encode()
    with pytest.raises(LayoutError):
        evidence.Collector(path, path, genesis)._basis()


def test_nothing_is_overwritten_or_left_by_half(tmp_path):
    folder = EvidenceFolder(tmp_path / "evidence")
    assert folder.files() == []
    name = "log-1-entry-5-wrong-view.evidence"
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / f".{name}.partial").write_bytes(b"cut off by a crash")
    assert folder.write(name, b"first")
    assert not folder.write(name, b"second")
    assert [file.name for file in folder.files()] == [name]
    assert folder.files()[0].read_bytes() == b"first"
    assert [file.name for file in (tmp_path / "evidence").iterdir()] == [name]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    folder = EvidenceFolder(tmp_path)
    name = "log-1-entry-5-a.evidence"
    monkeypatch.setattr(EvidenceFolder, "has_room", lambda *_: (tmp_path / name).write_bytes(b"theirs"))
    assert not folder.write(name, b"ours")
    assert (tmp_path / name).read_bytes() == b"theirs"


def test_the_folder_is_bounded(tmp_path, monkeypatch):
    folder = EvidenceFolder(tmp_path / "evidence")
    monkeypatch.setattr(evidence, "BYTES_MAX", 100)
    assert folder.write("log-1-entry-5-a.evidence", b"x" * 60)
    assert not folder.write("log-1-entry-6-a.evidence", b"x" * 41)
    assert folder.write("log-1-entry-6-a.evidence", b"x" * 40)
    monkeypatch.setattr(evidence, "BYTES_MAX", 1000)
    monkeypatch.setattr(evidence, "FILES_MAX", 3)
    assert folder.write("log-1-entry-7-a.evidence", b"x")
    assert not folder.write("log-1-entry-8-a.evidence", b"x")


@pytest.mark.parametrize("named", [True, False])
def test_what_one_log_did_is_nothing_against_the_next_one_of_that_number(tmp_path, monkeypatch, named):
    """Log 2 forked and was replaced; then the new one forks too. Each has its file, and what is read again is believed.

    named: whether the first file has a name as they are now, or one without the log's id.
    """
    old, new = (KeyedLog(LIAR, key) for key in (2002, 7777))
    members = tuple(Member(one, 1, KeyedLog(one).public_key) for one in (0, 1))
    first = replace(make_genesis(), members=(*members, Member(LIAR, 1, old.public_key)))
    second = first.successor(1, 12, (*members, Member(LIAR, 1, new.public_key, b"", 1)))
    folder = EvidenceFolder(tmp_path / "evidence")
    monkeypatch.setattr(evidence, "ThreadPoolExecutor", lambda *_: SimpleNamespace(submit=lambda call, *of: call(*of)))
    shown = []
    for genesis, key in ((first, 2002), (second, 7777)):
        path = tmp_path / f"store-{key}.sqlite"
        known, other = KeyedLog(LIAR, key), KeyedLog(LIAR, key)
        known.context = other.context = genesis.contexts()[LIAR]
        raw = known.say(Suspect(0)).raw
        size = len(Attestation.of_group(raw).raw)
        with closing(Store(path, genesis.cluster_id(), 0)) as store:
            store.write([StoredGroup(LIAR, 1, 1, raw[:size], raw[size:])], None, None)

        def keeper(genesis=genesis, path=path):
            return evidence.EvidenceKeeper(folder, path, tmp_path / "none", genesis, structlog.get_logger())

        before = keeper()
        assert (before.broken, before.of(LIAR)) == (frozenset(), [])
        group = GroupVerifier(genesis).verify(LIAR, other.say(Suspect(1)).raw)
        for found in (Forked(LIAR, 1, group), Exposed(LIAR, 1, Violation("malformed", ""), group)):
            before.want(found)
        if not named and genesis is first:
            for file in folder.files():
                file.rename(file.with_name(re.sub("-[0-9a-f]{16}-", "-", file.name)))
        again = keeper()
        assert again.broken == {LIAR}
        assert len(again.of(LIAR)) == 2
        shown += again.of(LIAR)
        files = len(folder.files())
        again.want(Forked(LIAR, 1, group))
        again.want(Exposed(LIAR, 1, Violation("malformed", ""), group))
        assert len(folder.files()) == files, "nothing is kept twice"
    assert len(set(shown)) == len(folder.files()) == 4


@pytest.mark.parametrize("told", [True, False])
def test_a_vote_beyond_the_list_is_kept_as_proof(tmp_path, told):
    """As the detector of a node does, which knows from its core where the list ends; without that nothing is proven."""
    world = World(4, operators=(OPERATOR,))
    after = world.change(*world.genesis.members[:2], *joining(LIAR))
    world.overrun(after.base)
    path = tmp_path / "store.sqlite"
    with closing(Store(path, world.genesis.cluster_id(), 0)) as store:
        for log in world.cluster.logs:
            for group in log.groups:
                size = len(Attestation.of_group(group.raw).raw)
                row = StoredGroup(log.author, group.first, group.last, group.raw[:size], group.raw[size:])
                store.write([row], None, None)
    home = SimpleNamespace(
        cluster=SimpleNamespace(genesis=world.genesis, before=None),
        store_path=path,
        state_path=tmp_path / "none",
        evidence_path=tmp_path / "evidence",
        number=0,
    )
    core = world.cluster.cores[0] if told else SimpleNamespace(ends=None)
    measures = SimpleNamespace(exposures=Counter())
    node = SimpleNamespace(home=home, log=structlog.get_logger(), seal=CLEAR, core=core, measures=measures)
    seen = detector.Detector(node)
    seen.on_exposed(world.found(Exposed)[0])
    for _ in range(evidence.ATTEMPTS_MAX):
        seen.keeper._thread.submit(lambda: None).result()
        seen.keeper.retry()
    seen.keeper.close()
    (file,) = EvidenceFolder(home.evidence_path).files()
    spans = [(world.genesis, after.base), (after, None)]
    assert file.name.endswith("-beyond-list.evidence")
    if told:
        assert examine_under(file.read_bytes(), spans, GroupVerifier, signed_envelope)[0].rule == "beyond-list"
    else:
        with pytest.raises(UnprovenError, match="not self-contained"):
            examine_under(file.read_bytes(), spans, GroupVerifier, signed_envelope)


def test_a_forged_fork_breaks_nobody(tmp_path):
    """What lies in the folder is believed only as far as it verifies."""
    folder = EvidenceFolder(tmp_path / "evidence")
    folder.write("log-1-fork.json", b'{"contradiction": []}')
    folder.write("log-99-fork.json", b"{}")
    cluster = Nodes(tmp_path / "c")
    identities = detector.EvidenceKeeper(
        folder, tmp_path / "none", tmp_path / "none", cluster.cluster.genesis, None
    )._collector.verifier.identities
    assert folder.broken_logs(identities) == set()
