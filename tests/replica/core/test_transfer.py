"""Fetching a state from several replicas: only what verifies is taken, and whoever sends anything else is asked no more."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.apps.kv import KeyValue
from replica.core import transfer as module
from replica.core import treeparts
from replica.core.events import AskPart
from replica.core.execution import Executor
from replica.core.genesis import Ordering
from replica.core.layout import LayoutError
from replica.core.snapshot import PartWanted, Snapshot, Source
from replica.core.transfer import PART_DEADLINE_MS, PARTS_AT_ONCE_PER_PEER, SILENCES_MAX, PoisonedError, Transfer
from replica.core.tree import bucket_of
from replica.core.treeparts import Kind, Want, part_of
from tests.replica.core.support import examples
from tests.replica.core.traffic import milestones, run_with_votes_in_flight, snapshot_of

RUN = run_with_votes_in_flight(Ordering.THREE_PHASE)
GENESIS = RUN.genesis
SAVED = milestones(RUN, 0)


def state_of(count: int = 1) -> Snapshot:
    """The state of the run's first milestones; at the first one's cut there are votes in flight."""
    snapshot = snapshot_of(GENESIS, SAVED[:count])
    snapshot.executor.roots()
    return snapshot


def answer(snapshot: Snapshot, wanted: PartWanted) -> bytes:
    """What an honest source sends."""
    wanted = PartWanted.decode(wanted.source, wanted.number, b"" if wanted.want is None else wanted.want.encode())
    if wanted.source is Source.LOGS:
        return snapshot.states[wanted.number].encode()
    if wanted.source is Source.BATCHES:
        return snapshot.batches[wanted.number].raw
    assert wanted.want is not None
    executor = snapshot.executor
    return part_of(executor.state if wanted.source is Source.APPLICATION else executor.table.records, wanted.want)


class Fetching:
    """A transfer and the questions that it asked and that nobody answered yet."""

    def __init__(self, *sources: int, mine: Executor | None = None, count: int = 1) -> None:
        self.truth = state_of(count)
        mine = mine or Executor(KeyValue(), GENESIS)
        self.transfer = Transfer(self.truth.header, b"certificate", GENESIS, mine)
        for source in sources:
            self.transfer.add_source(source)
        self.now = 0
        self.open: list[AskPart] = []
        self.asked: list[AskPart] = []

    def due(self, ms: int = 0) -> list[AskPart]:
        self.now += ms
        questions = self.transfer.due(self.now)
        self.open += questions
        self.asked += questions
        return questions

    def take(self, question: AskPart, data: bytes | None) -> None:
        self.open.remove(question)
        self.transfer.take(question.ask, question.want, data)

    def honestly(self, question: AskPart) -> None:
        self.take(question, answer(self.truth, question.want))

    def until(self, found: Callable[[AskPart], bool]) -> AskPart:
        """Answer everything up to a question that fits, and return that."""
        while not self.transfer.is_complete:
            self.due()
            for question in list(self.open):
                if found(question):
                    return question
                self.honestly(question)
        raise AssertionError("it was never asked")

    def finish(self, silent: tuple[int, ...] = ()) -> Snapshot:
        for _ in range(1000):
            if self.transfer.is_complete:
                break
            self.due()
            answered = [question for question in self.open if question.ask not in silent]
            for question in answered:
                self.honestly(question)
            if not answered:
                self.due(PART_DEADLINE_MS)
        snapshot = self.transfer.fetched().snapshot(KeyValue(), GENESIS)
        self.check(snapshot)
        return snapshot

    def check(self, snapshot: Snapshot) -> None:
        header = self.truth.header
        assert (snapshot.header, snapshot.certificate) == (header, b"certificate")
        assert snapshot.states == self.truth.states
        assert snapshot.batches == self.truth.batches
        executor = snapshot.executor
        assert executor.roots() == (header.application, header.table)
        assert (executor.slot, executor.time_ms) == (header.slot, header.time_ms)
        assert executor.take_changes() == ([], []), "it is made durable whole"


def test_the_state_holds_everything_that_can_be_fetched():
    truth = state_of()
    assert len(truth.batches) == 5
    assert len(truth.executor.state) > 3
    assert len(truth.executor.table.records) > 0


@pytest.mark.parametrize("sources", [(1,), (0, 1), (0, 1, 2, 3)])
def test_everything_is_fetched_and_verified(sources: tuple[int, ...]):
    fetching = Fetching(*sources)
    assert (fetching.transfer.slot, fetching.transfer.sources) == (8, sources)
    assert not fetching.transfer.is_complete
    fetching.finish()
    assert {question.ask for question in fetching.asked} == set(sources)
    assert len({question.want for question in fetching.asked}) == len(fetching.asked), "nothing is asked twice"
    assert {question.want.source for question in fetching.asked} == set(Source)
    assert fetching.due() == []


def test_what_was_moved_is_counted():
    fetching = Fetching(0, 1)
    fetching.finish()
    moved, state = fetching.transfer.fetched().moved, fetching.truth.executor.state
    assert moved.part_bytes == sum(len(answer(fetching.truth, question.want)) for question in fetching.asked)
    assert moved.bucket_keys == len(state)
    assert moved.buckets == len({bucket_of(key) for key, _ in state.scan()})


def test_nobody_is_asked_for_more_than_a_few_things_at_once():
    fetching = Fetching(0, 1)
    while not fetching.transfer.is_complete:
        fetching.due()
        for source in (0, 1):
            assert sum(question.ask == source for question in fetching.open) <= PARTS_AT_ONCE_PER_PEER
        fetching.honestly(fetching.open[0])


def test_what_is_here_already_is_not_fetched():
    behind = state_of(1)
    whole = Fetching(0, count=2)
    whole.finish()
    little = Fetching(0, mine=behind.executor, count=2)
    little.finish()
    assert len(little.asked) < len(whole.asked)
    assert 0 < little.transfer.fetched().moved.part_bytes < whole.transfer.fetched().moved.part_bytes
    same = Fetching(0, mine=state_of(2).executor, count=2)
    same.finish()
    assert {question.want.source for question in same.asked} <= {Source.LOGS, Source.BATCHES}


def kind_of(wanted: PartWanted) -> tuple[Source, Kind | None]:
    return wanted.source, None if wanted.want is None else wanted.want.kind


KINDS = [
    (Source.LOGS, None),
    (Source.BATCHES, None),
    *((source, kind) for source in (Source.APPLICATION, Source.TABLE) for kind in Kind),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "empty", "gone"])
def test_a_poisoned_part_is_refused_and_asked_for_elsewhere(kind: tuple[Source, Kind | None], how: str):
    fetching = Fetching(0, 1)
    question = fetching.until(lambda question: kind_of(question.want) == kind)
    truth = answer(fetching.truth, question.want)
    flipped = truth[:-1] + bytes([truth[-1] ^ 1])
    wrong = {"flipped": flipped, "shorter": truth[:-1], "longer": truth + b"\0", "empty": b"", "gone": None}[how]
    with pytest.raises(PoisonedError, match=f"replica {question.ask}, {kind[0].name.lower()}"):
        fetching.take(question, wrong)
    honest = 1 - question.ask
    assert fetching.transfer.sources == (honest,)
    asked = len(fetching.asked)
    fetching.open = [other for other in fetching.open if other.ask == honest]
    fetching.finish()
    again = [later for later in fetching.asked[asked:] if kind_of(later.want) == kind]
    assert again, "the other one is asked for it"
    assert {later.ask for later in fetching.asked[asked:]} == {honest}


def test_whoever_sent_poison_is_not_asked_again_though_it_offers_the_state_again():
    fetching = Fetching(0, 1)
    fetching.due()
    question = next(question for question in fetching.open if question.ask == 0)
    with pytest.raises(PoisonedError):
        fetching.take(question, b"poison")
    fetching.transfer.add_source(0)
    assert fetching.transfer.sources == (1,)


def test_nobody_is_left():
    fetching = Fetching(0)
    (first, *_) = fetching.due()
    with pytest.raises(PoisonedError, match="does not have that state any more"):
        fetching.take(first, None)
    assert (fetching.transfer.sources, fetching.due()) == ((), [])
    fetching.transfer.drop_source(0)
    fetching.transfer.add_source(1)
    fetching.open.clear()
    assert first.want in {question.want for question in fetching.due()}, "somebody else has it"
    fetching.finish()


def test_what_nobody_asked_for_changes_nothing():
    fetching = Fetching(0, 1)
    question = fetching.due()[0]
    for peer, wanted in (
        (1 - question.ask, question.want),  # asked of the other one
        (2, question.want),  # no source
        (question.ask, PartWanted(Source.BATCHES, 0)),
        (question.ask, PartWanted(Source.TABLE, want=Want(Kind.DIGESTS, 7))),
    ):
        fetching.transfer.take(peer, wanted, b"poison")
    assert fetching.transfer.sources == (0, 1)
    assert not fetching.transfer._states
    fetching.finish()


def test_an_answer_that_comes_too_late_changes_nothing():
    fetching = Fetching(0)
    question = fetching.due()[0]
    assert fetching.due(PART_DEADLINE_MS - 1) == []
    again = fetching.due(1)
    assert [later.want for later in again] == [question.want], "whoever is slow is asked for one thing at a time"
    fetching.transfer.add_source(1)
    elsewhere = fetching.due(PART_DEADLINE_MS)
    assert elsewhere[0] == AskPart(1, 8, question.want)
    fetching.transfer.take(0, question.want, b"poison, and late")
    assert fetching.transfer.sources == (0, 1)


def test_what_a_silent_source_leaves_is_asked_of_those_who_answer():
    fetching = Fetching(0, 1)
    fetching.due()
    left = [question.want for question in fetching.open if question.ask == 0]
    assert len(left) == PARTS_AT_ONCE_PER_PEER
    for question in [question for question in fetching.open if question.ask == 1]:
        fetching.honestly(question)
    fetching.open.clear()
    fetching.due(PART_DEADLINE_MS)
    assert {question.want for question in fetching.open if question.ask == 1} >= set(left[:PARTS_AT_ONCE_PER_PEER])
    fetching.finish(silent=(0,))
    assert fetching.now < 3 * PART_DEADLINE_MS, "one that is silent holds nothing up for long"


def test_a_source_that_is_silent_too_often_is_asked_no_more():
    fetching = Fetching(0)
    asked = []
    for _ in range(SILENCES_MAX + 1):
        asked.append(len(fetching.due(PART_DEADLINE_MS)))
        assert fetching.transfer.sources == (0,)
    assert asked == [PARTS_AT_ONCE_PER_PEER] + [1] * SILENCES_MAX
    assert fetching.due(PART_DEADLINE_MS) == []
    assert fetching.transfer.sources == ()
    fetching.transfer.add_source(0)
    assert fetching.transfer.sources == (0,), "silence is no lie: it may offer the state again"


def test_an_answer_ends_a_silence():
    fetching = Fetching(0)
    for _ in range(3 * SILENCES_MAX):
        fetching.due(PART_DEADLINE_MS)
        fetching.open = fetching.open[-1:]
        fetching.due(PART_DEADLINE_MS)
        if fetching.open and not fetching.transfer.is_complete:
            fetching.honestly(fetching.open[-1])
    assert fetching.transfer.sources == (0,)
    fetching.finish()


# Buckets larger than a part


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(treeparts, "PART_BYTES_MAX", 40)
    monkeypatch.setattr(treeparts, "SLICE_BYTES_MAX", 26)
    # The node and bucket digests are larger than that; only buckets are limited here.


def is_slice(question: AskPart) -> bool:
    return question.want.want is not None and question.want.want.offset > 0


def begins_slices(fetching: Fetching, question: AskPart) -> bool:
    """Say whether the answer to this question will be the first slice of a bucket."""
    want = question.want.want
    if want is None or want.kind is not Kind.BUCKETS or want.offset:
        return False
    return not treeparts.decode_pieces(want, answer(fetching.truth, question.want))[0].is_whole


@pytest.mark.usefixtures("sliced")
def test_slices_of_one_bucket_are_asked_of_one_source():
    fetching = Fetching(0, 1, 2)
    fetching.finish()
    slices: dict[tuple, set[int]] = {}
    for question in fetching.asked:
        if is_slice(question):
            want = question.want.want
            assert want is not None
            slices.setdefault((question.want.source, want.node, want.buckets), set()).add(question.ask)
    assert len(slices) > 1
    assert all(len(sources) == 1 for sources in slices.values())


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("end", ["dropped", "silent"])
def test_slices_begin_again_elsewhere_if_their_source_is_gone(end: str):
    """What the one that is gone sent may be wrong, and nobody else may be blamed for it."""
    fetching = Fetching(0, 1)
    first = fetching.until(lambda question: begins_slices(fetching, question))
    truth = answer(fetching.truth, first.want)
    fetching.take(first, truth[:-1] + bytes([truth[-1] ^ 1]))
    if end == "dropped":
        fetching.transfer.drop_source(first.ask)
        fetching.open = [question for question in fetching.open if question.ask != first.ask]
    fetching.finish(silent=(first.ask,))
    assert 1 - first.ask in fetching.transfer.sources


@pytest.mark.usefixtures("sliced")
def test_slices_that_make_no_bucket_are_their_sources_fault():
    fetching = Fetching(0, 1)
    first = fetching.until(lambda question: begins_slices(fetching, question))
    truth = answer(fetching.truth, first.want)
    fetching.take(first, truth[:-1] + bytes([truth[-1] ^ 1]))
    with pytest.raises(PoisonedError):
        fetching.finish()
    assert fetching.transfer.sources == (1 - first.ask,)
    fetching.open = [question for question in fetching.open if question.ask != first.ask]
    fetching.finish()


def lie(rng: random.Random, truth: bytes) -> bytes | None:
    place = rng.randrange(len(truth))
    return rng.choice(
        [
            None,
            b"",
            truth[:place],
            truth + b"\0",
            rng.randbytes(len(truth)),
            truth[:place] + bytes([truth[place] ^ 1 << rng.randrange(8)]) + truth[place + 1 :],
        ]
    )


def among_liars(seed: int) -> tuple[Fetching, int]:
    """One honest source among three that lie, are silent or late; return the fetching and how much was refused."""
    rng = random.Random(seed)
    fetching, poisoned = Fetching(*rng.sample(range(4), 4)), 0
    for _ in range(3000):
        if fetching.transfer.is_complete:
            fetching.check(fetching.transfer.fetched().snapshot(KeyValue(), GENESIS))
            return fetching, poisoned
        fetching.due(rng.choice([0, 0, 100, 1000]))
        for peer in range(1, 4):
            if rng.random() < 0.2:
                fetching.transfer.add_source(peer)
        for question in [question for question in fetching.open if question.ask == 0]:
            try:
                fetching.honestly(question)
            except LayoutError:
                raise AssertionError("an honest source is asked for what there is not") from None
        if not fetching.open:
            continue
        question = rng.choice(fetching.open)
        try:
            truth = answer(fetching.truth, question.want)
        except LayoutError:
            continue  # a slice of what a liar said is there
        if rng.random() < 0.5:
            try:
                fetching.take(question, truth if rng.random() < 0.7 else lie(rng, truth))
            except PoisonedError:
                poisoned += 1
        assert 0 in fetching.transfer.sources, "an honest source that answers is never dropped"
    raise AssertionError("never complete")


@examples(60)
@given(st.integers(0, 2**32))
def test_one_honest_source_among_liars_is_enough(seed: int):
    among_liars(seed)


@pytest.mark.usefixtures("sliced")
def test_liars_in_slices_hurt_nobody_else():
    refused = [among_liars(seed)[1] for seed in range(40)]
    assert sum(refused) > 20


def search(count: int) -> None:
    for seed in range(count):
        among_liars(seed)


MUTANTS: dict[str, tuple[str, Callable]] = {
    "logs are not compared": ("state_digest", lambda data: Whatever()),
    "batches are not compared": ("batch_digest", lambda data: Whatever()),
}


class Whatever:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("name", MUTANTS)
def test_the_search_notices(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, *MUTANTS[name])
    with pytest.raises((AssertionError, PoisonedError, LayoutError, KeyError)):
        search(100)
