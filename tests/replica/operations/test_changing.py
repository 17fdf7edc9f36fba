"""What an operator's program hears from replicas about the next list: each answers its questions, and no more."""

import asyncio
from types import SimpleNamespace

from replica.core.chain import LINK_BYTES_MAX
from replica.operations import changing
from replica.operations.changing import Council
from replica.wire.messages import AskMembers, MembersShown
from tests.support.waiting import on_loop

LISTS = 2  # that are known
LOOK_S = 0.05


class Line:
    is_welcome = writable = True

    def __init__(self, number: int) -> None:
        self.place = SimpleNamespace(number=number)
        self.sent: list = []

    def send(self, message) -> None:
        self.sent.append(message)


def council(count=3) -> tuple[Council, list[Line]]:
    made = Council(SimpleNamespace(links=(b"",) * LISTS, genesis=SimpleNamespace(quorum=2)), None)  # type: ignore[arg-type]
    lines = [Line(number) for number in range(count)]
    for line in lines:
        made._lines[line.place.number] = line  # type: ignore[assignment]
    return made, lines


def shown(link: bytes, number: int = LISTS) -> MembersShown:
    return MembersShown(number, link)


@on_loop
async def test_a_link_that_nobody_asked_for_is_not_kept():
    made, _ = council()
    for size in range(200):
        made.hear(1, shown(b"x" * size))
    assert await made._look() is None


@on_loop
async def test_each_replica_answers_once_and_none_is_drowned_out():
    made, lines = council()
    for line in lines:
        made.welcome(line)  # type: ignore[arg-type]
        assert line.sent == [AskMembers(LISTS)]
    made.hear(1, shown(b"of 1"))
    made.hear(1, shown(b"one more"))
    made.hear(2, shown(b"of 2"))
    made.hear(0, shown(b"of another list", LISTS + 1))
    made.hear(0, shown(bytes(LINK_BYTES_MAX + 1)))
    made.hear(0, shown(b"of 0"))
    assert [await made.next_link() for _ in range(3)] == [b"of 1", b"of 2", b"of 0"]


@on_loop
async def test_who_answers_at_once_is_not_asked_at_once_again(monkeypatch):
    monkeypatch.setattr(changing, "LOOK_S", LOOK_S)
    made, lines = council(1)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    lines[0].send = lambda _: loop.call_soon(made.hear, 0, shown(b"false"))  # type: ignore[method-assign, assignment]
    for _ in range(4):
        assert await made.next_link() == b"false"
    assert loop.time() - begun >= 3 * LOOK_S * 0.9


@on_loop
async def test_enough_who_know_of_no_other_list_end_the_search():
    made, lines = council()
    for line in lines:
        made.welcome(line)  # type: ignore[arg-type]
    for number in (1, 1, 1):
        made.hear(number, shown(b""))
    assert made._nothing_more == {1}
    made.hear(2, shown(b""))
    assert await made.later() is None
