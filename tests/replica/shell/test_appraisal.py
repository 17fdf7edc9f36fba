"""Replicas appraise each other at connection: what passes is shown, what fails is refused, counted and asked again."""

import hashlib
import json

import pytest

from replica.cluster.clusterfile import ClusterFileError, load_cluster_file
from replica.shell import appraisal
from replica.wire.handshake import EVIDENCE_VERSION, evidence_nonce
from replica.wire.messages import AskEvidence, EvidenceShown, GroupMessage, Ping, Pong, Refused, Subscribe, Welcome
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire
from tests.trustlog.appraisal import amd
from tests.trustlog.appraisal.support import SimulatedTsm, certificate_table
from tests.trustlog.service.support import process_log, serve_in_thread
from tests.trustlog.support import fixed_key
from trustlog import BackendKind, MisuseError, open_log
from trustlog.appraisal import make_evidence, tsm
from trustlog.measurement import own_measurement

OWN = own_measurement(BackendKind.SOFTWARE).hex()
NONCE = bytes(range(32))


def demand(cluster: Nodes, text: str) -> None:
    """Write a policy into the cluster file."""
    path = cluster.directory / "cluster.toml"
    path.write_text(f"{path.read_text()}\n[appraisal]\n{text}\n")
    cluster.cluster = load_cluster_file(cluster.directory)


def appraised(cluster, number: int) -> dict[int, dict]:
    report = json.loads(cluster.nodes[number].status_json())
    return {peer["replica"]: peer["appraisal"] for peer in report["peers"]}


async def all_appraised(cluster) -> None:
    await until(
        lambda: all(one is not None for number in cluster.nodes for one in appraised(cluster, number).values()),
        "every replica to have appraised every other",
    )


class Liar:
    """A log whose quotes are another's, whatever it is asked; everything else is the log's own."""

    def __init__(self, log, quote) -> None:
        self._log = log
        self.quote = quote

    def __getattr__(self, name):
        return getattr(self._log, name)


@on_loop
async def test_without_a_policy_everybody_passes_and_is_shown(cluster):
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        await all_appraised(cluster)
        for number in range(3):
            for result in appraised(cluster, number).values():
                assert result["text"] == f"self-asserted, measured {OWN[:8]}…"
                assert (result["evidence"], result["measurement"], result["refused"]) == ("self-asserted", OWN, None)
                assert any("a program that lies" in one for one in result["not_proven"])


@on_loop
async def test_under_a_policy_that_accepts_this_program_the_cluster_serves(cluster):
    demand(cluster, f'minimum_evidence = "self-asserted"\naccepted_measurements = ["{OWN}"]')
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("key", "value")
        assert not any(name.startswith("evidence") for node in cluster.nodes.values() for name in node.refusals)


@on_loop
async def test_a_peer_with_another_program_is_refused_and_the_rest_serve(cluster):
    demand(cluster, f'minimum_evidence = "self-asserted"\naccepted_measurements = ["{OWN}"]')
    log = open_log(cluster.folder(2) / "log")
    log._measurement = b"\x66" * 32
    async with cluster:
        cluster.start(0, 1)
        cluster.make(2, log=log).start()
        async with cluster.client() as client:
            await client.put("key", "value")
        await until(
            lambda: all(cluster.nodes[n].refusals["evidence-wrong-measurement"] > 1 for n in (0, 1)), "refusals"
        )
        for number in (0, 1):
            node = cluster.nodes[number]
            assert not node.links[2].is_up
            assert "does not accept the program 6666" in node.links[2].trouble
            assert appraised(cluster, number)[2]["text"].startswith("refused: the policy does not accept the program")
            assert node.links[1 - number].is_up
        await until(lambda: "does not accept your evidence" in cluster.nodes[2].links[0].trouble, "2 to know why")
        # Once it shows what is accepted, it is read again; nobody has to be restarted.
        log._measurement = bytes.fromhex(OWN)
        await until(lambda: all(cluster.nodes[n].links[2].is_up for n in (0, 1)), "2 accepted")
        await cluster.wait_ready()


@pytest.mark.parametrize(("minimum", "passes"), [("none", True), ("self-asserted", False)])
@on_loop
async def test_a_peer_without_evidence_is_handled_by_the_policy(cluster, minimum, passes):
    demand(cluster, f'minimum_evidence = "{minimum}"')

    def nothing(**_):
        raise MisuseError("this log quotes nothing")

    async with cluster:
        cluster.start(0, 1)
        cluster.make(2, log=Liar(open_log(cluster.folder(2) / "log"), nothing)).start()
        await all_appraised(cluster)
        await until(lambda: appraised(cluster, 0)[2] is not None, "2 appraised")
        if passes:
            await cluster.wait_ready()
            assert appraised(cluster, 0)[2]["text"] == "no evidence"
        else:
            await until(lambda: cluster.nodes[0].refusals["evidence-missing"] > 1, "refusals")
            assert "it shows no evidence, and the cluster demands 'self-asserted'" in appraised(cluster, 0)[2]["text"]
            assert not cluster.nodes[0].links[2].is_up
        assert cluster.nodes[2].refusals["evidence-not-made"]


@on_loop
async def test_hardware_is_demanded_and_nobody_has_it(cluster):
    demand(cluster, 'minimum_evidence = "hardware"')
    async with cluster:
        cluster.start()
        await until(
            lambda: all(n.refusals["evidence-insufficient-evidence"] for n in cluster.nodes.values()), "refusals"
        )
        assert not any(link.is_up for node in cluster.nodes.values() for link in node.links.values())


def evidence_for(cluster, number: int, asked: AskEvidence, **changed) -> EvidenceShown:
    """What replica `number` would show, made with its own log."""
    node = cluster.nodes[0]
    place = cluster.cluster.replicas[number]
    with open_log(cluster.folder(number) / "log") as log:
        nonce = changed.get("nonce", evidence_nonce(asked.nonce, number, place.certificate_der))
        context = changed.get("context", node.verifier.context(node.number))
        return EvidenceShown(EVIDENCE_VERSION, make_evidence(log, nonce=nonce, context=context).encode())


@on_loop
async def test_nothing_is_handed_out_before_the_evidence(cluster):
    demand(cluster, 'minimum_evidence = "self-asserted"')
    async with cluster:
        cluster.start(0)
        async with Wire(cluster, 0, as_replica=2) as wire:
            assert isinstance(await wire.replica_hello(2), Welcome)
            asked = await wire.receive()
            assert isinstance(asked, AskEvidence)
            wire.send(Subscribe(1), GroupMessage(0, b"dropped"), Ping(1))
            assert isinstance(await wire.receive(), Pong)  # and no group before it
            assert cluster.nodes[0].refusals["before-appraisal"] == 1
            wire.send(evidence_for(cluster, 2, asked))
            assert (await wire.receive(GroupMessage)).log == 0


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (lambda cluster, asked: EvidenceShown(EVIDENCE_VERSION, b""), "evidence-missing"),
        (lambda cluster, asked: EvidenceShown(EVIDENCE_VERSION + 1, b"x"), "evidence-missing"),
        (lambda cluster, asked: EvidenceShown(EVIDENCE_VERSION, b"{}"), "evidence-malformed"),
        (lambda cluster, asked: EvidenceShown(EVIDENCE_VERSION, b" " * (256 * 1024 + 1)), "evidence-malformed"),
        (lambda cluster, asked: evidence_for(cluster, 2, asked, nonce=asked.nonce), "evidence-wrong-nonce"),
        (lambda cluster, asked: evidence_for(cluster, 2, AskEvidence(1, NONCE)), "evidence-wrong-nonce"),
        (lambda cluster, asked: evidence_for(cluster, 2, asked, context=bytes(32)), "evidence-wrong-context"),
        (lambda cluster, asked: evidence_for(cluster, 1, asked), "evidence-wrong-nonce"),
    ],
)
@on_loop
async def test_evidence_that_is_refused(cluster, shown, reason):
    demand(cluster, 'minimum_evidence = "self-asserted"')
    async with cluster:
        cluster.start(0)
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            wire.send(Subscribe(1), shown(cluster, await wire.receive(AskEvidence)))
            said = await wire.receive()
            assert isinstance(said, Refused)
            assert said.code == "appraisal"
            await wire.ended()
        assert cluster.nodes[0].refusals[reason] == 1


@on_loop
async def test_a_log_of_another_key_is_refused(cluster):
    """Replica 2's certificate, with evidence of a log that is not the one in the cluster file."""
    demand(cluster, 'minimum_evidence = "self-asserted"')
    async with cluster:
        cluster.start(0)
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            asked = await wire.receive(AskEvidence)
            nonce = evidence_nonce(asked.nonce, 2, cluster.cluster.replicas[2].certificate_der)
            context = cluster.nodes[0].verifier.context(2)
            with open_log(cluster.folder(1) / "log") as log:
                wire.send(EvidenceShown(1, make_evidence(log, nonce=nonce, context=context).encode()))
            assert (await wire.receive(Refused)).code == "appraisal"
        assert cluster.nodes[0].refusals["evidence-wrong-log"] == 1


@on_loop
async def test_evidence_of_another_backend_is_refused(cluster):
    """The right key, but it says that a process of its own keeps it, and the cluster file says otherwise."""
    demand(cluster, 'minimum_evidence = "self-asserted"')
    async with cluster:
        cluster.start(0)
        with open_log(cluster.folder(2) / "log") as log:
            other = process_log(log._private_key)
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            asked = await wire.receive(AskEvidence)
            nonce = evidence_nonce(asked.nonce, 2, cluster.cluster.replicas[2].certificate_der)
            evidence = make_evidence(other, nonce=nonce, context=cluster.nodes[0].verifier.context(2))
            wire.send(EvidenceShown(1, evidence.encode()))
            assert (await wire.receive(Refused)).code == "appraisal"
        assert cluster.nodes[0].refusals["evidence-wrong-kind"] == 1


@on_loop
async def test_evidence_that_breaks_the_appraisal_is_refused_and_old_trust_is_not_shown(cluster, monkeypatch):
    """A mistake in the reading of evidence must not let a peer keep what it once passed with."""
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        await all_appraised(cluster)
        node = cluster.nodes[0]
        assert appraised(cluster, 0)[1]["evidence"] == "self-asserted"

        def broken(*_arguments, **_options):
            raise LookupError("a field that nobody thought of")

        monkeypatch.setattr(appraisal, "decode_evidence", broken)
        ends = []
        examination = appraisal.Examination(node.appraisals, Told(), NONCE, ends.append)
        examination.begin(1)
        examination.on_shown(EvidenceShown(EVIDENCE_VERSION, b"x"))
        said = "its evidence cannot be judged: LookupError: a field that nobody thought of"
        assert ends == [said]
        assert node.refusals["evidence-not-judged"] == 1
        shown = appraised(cluster, 0)[1]
        assert (shown["text"], shown["evidence"], shown["refused"]) == (f"refused: {said}", None, said)


class Told:
    """A connection that only remembers what it was told."""

    is_open = True

    def __init__(self) -> None:
        self.sent: list = []
        self.refused: list[str] = []

    def send(self, message) -> None:
        self.sent.append(message)

    def refuse(self, reason) -> None:
        self.refused.append(reason)


@on_loop
async def test_one_examination_has_one_end():
    class Judge:
        def judge(self, peer, nonce, shown):
            return "no good" if shown else None

    connection, ends = Told(), []
    examination = appraisal.Examination(Judge(), connection, NONCE, ends.append)
    examination.on_shown(EvidenceShown(EVIDENCE_VERSION, b"x"))
    assert (connection.refused, ends) == (["evidence-unasked"], [])
    examination.begin(1)
    assert connection.sent == [AskEvidence(EVIDENCE_VERSION, NONCE)]
    examination.on_shown(EvidenceShown(EVIDENCE_VERSION, b"x"))
    examination.on_shown(EvidenceShown(EVIDENCE_VERSION, b""))
    examination._judge(b"")  # a timer that was not cancelled in time
    assert ends == ["no good"]
    examination.close()
    unasked = appraisal.Examination(Judge(), connection, NONCE, ends.append)
    unasked.close()
    unasked._judge(b"")
    assert ends == ["no good"]


@on_loop
async def test_who_shows_nothing_in_time_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(appraisal, "EVIDENCE_S", 0.1)
    demand(cluster, 'minimum_evidence = "self-asserted"')
    async with cluster:
        cluster.start(0)
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            assert (await wire.receive(Refused)).code == "appraisal"
        assert cluster.nodes[0].refusals["evidence-missing"] == 1


@on_loop
async def test_asking_is_bounded_and_versioned(cluster):
    async with cluster:
        cluster.start(0)
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            wire.send(AskEvidence(EVIDENCE_VERSION + 1, NONCE))
            assert await wire.receive(EvidenceShown) == EvidenceShown(EVIDENCE_VERSION, b"")
            wire.send(AskEvidence(EVIDENCE_VERSION, NONCE))
            assert (await wire.receive(EvidenceShown)).evidence
            wire.send(*[AskEvidence(EVIDENCE_VERSION, NONCE)] * 3)
            await wire.ended()
        refusals = cluster.nodes[0].refusals
        assert (refusals["evidence-version"], refusals["evidence-asked-too-often"]) == (1, 1)


@on_loop
async def test_a_client_can_ask_for_no_evidence(cluster):
    async with cluster:
        cluster.start(0)
        async with Wire(cluster, 0) as wire:
            await wire.hello()
            wire.send(AskEvidence(EVIDENCE_VERSION, NONCE))
            await wire.ended()
        assert cluster.nodes[0].refusals["malformed-message"] == 1


@on_loop
async def test_a_confidential_virtual_machine_adds_its_report_if_it_can(cluster, monkeypatch, tmp_path):
    """Its root is our own maker's; once the platform fails, the rest is shown without the report, and refused for it."""
    root = hashlib.sha256(amd.ark()).hexdigest()
    demand(cluster, f'minimum_evidence = "sev-snp"\n[appraisal.sev-snp]\nroots = ["{root}"]')
    folder = SimulatedTsm(amd.report, auxiliary=certificate_table(amd.ark(), amd.ask(), amd.vcek()))
    make_report = tsm.make_report
    monkeypatch.setattr(tsm, "TSM_DIRECTORY", tmp_path)
    monkeypatch.setattr(tsm, "make_report", lambda inblob: make_report(inblob, files=folder))
    async with cluster:
        cluster.start(0, 1)
        await until(lambda: cluster.nodes[0].links[1].is_up and cluster.nodes[1].links[0].is_up, "the links")
        assert "endorsed by AMD" in appraised(cluster, 0)[1]["text"]
        await cluster.stop(1)
        folder.fail = "outblob"
        cluster.start(1)
        await until(lambda: cluster.nodes[0].refusals["evidence-insufficient-evidence"], "a refusal")
        assert not cluster.nodes[0].links[1].is_up


def test_a_log_in_a_process_of_its_own_is_quoted_by_its_service():
    log = process_log(fixed_key())
    with serve_in_thread(log) as remote:
        evidence = make_evidence(remote, nonce=NONCE, context=NONCE)
    assert json.loads(evidence.encode())["measurement"] == own_measurement(BackendKind.PROCESS).hex()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('minimum_evidense = "tpm"', 'appraisal: minimum_evidense: is not a key.*did you mean "minimum_evidence"'),
        ("[appraisal.tpm]\nrequire_measured_boot = true", "replicas show each other no lists"),
        ("format = 1", "appraisal: format: is not a key"),
    ],
)
def test_mistakes_in_the_cluster_file_are_named(cluster, text, message):
    with pytest.raises(ClusterFileError, match=message):
        demand(cluster, text)


def test_the_policy_is_not_agreed_on(cluster):
    before = load_cluster_file(cluster.directory)
    demand(cluster, 'minimum_evidence = "self-asserted"')
    after = load_cluster_file(cluster.directory)
    assert before.cluster_id == after.cluster_id
    assert before.appraisal != after.appraisal
