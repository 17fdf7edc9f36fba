"""From three members to seven and back, by the commands that an operator types, while clients count up."""

import asyncio
from collections import defaultdict

import pytest

from replica.core.quorum import FAULTS_MAX
from replica.shell.statestore import PinnedState
from tests.cluster.test_members import DEADLINE_S, Changing, refusal, seats_of, under_load
from tests.support.waiting import on_loop_for, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


class Growing(Changing):
    """What must hold at every size."""

    def check_list(self, number, since):
        """Say the list's number, and with which list each member came in: so many are there, of which f may fail."""
        listed = self.listed()
        assert [one["number"] for one in listed["replicas"]] == list(range(len(since)))
        assert [one["since_list"] for one in listed["replicas"]] == since
        assert (listed["list"], listed["f"], listed["following"]) == (number, len(since) // 2, None)
        assert self.present().genesis.n == len(since)

    async def agree(self):
        """Wait until every member executed one slot that is later than all states so far, and stored the same state.

        The header of what is stored has the digests of the application's state, of the table of clients and of all logs
        up to the slot. What others store meanwhile is compared, too.
        """
        genesis = self.present().genesis
        states = defaultdict(dict)

        def look():
            for number in range(genesis.n):
                slot, header = stored(self.folder(number))
                states[slot][number] = header
            return [slot for slot, headers in states.items() if slot > floor and len(headers) == genesis.n]

        floor = genesis.base
        look()
        floor = max(floor, *states)
        await until(look, f"{genesis.n} members store the state after one slot above {floor}", DEADLINE_S)
        differ = [slot for slot, headers in states.items() if len(set(headers.values())) != 1]
        assert not differ, f"members have different states after slots {differ}"

    async def serves(self, count=20):
        """Wait until the clients have counted on, asked through a client that begins now."""
        async with self.client_now() as client:
            before = int(await client.get("counter-0"))

            async def counted_on():
                return int(await client.get("counter-0")) >= before + count

            await until(counted_on, f"{count} more are counted", DEADLINE_S)

    def refused(self, *words, expected=2):
        return self.member(*words, expected=expected).stderr


def stored(folder):
    """Return the slot and the header of the state that a replica keeps on its disk."""
    with PinnedState(folder / "state.sqlite") as view:
        return view.slot, view.header


@pytest.mark.long
def test_from_three_to_seven_and_back_under_load(tmp_path):
    """No request fails on the way, not even with three of seven killed; what would break a quorum is refused."""
    with Growing(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        async def walk():
            cluster.check_list(0, [0] * 3)
            await grow(cluster, 1)
            cluster.check_list(1, [0] * 3 + [1] * 2)
            await grow(cluster, 2)
            cluster.check_list(2, [0] * 3 + [1] * 2 + [2] * 2)
            await what_seven_refuse(cluster)
            await three_of_seven_are_killed(cluster)
            await shrink(cluster, 3)
            cluster.check_list(3, [0] * 3 + [1] * 2)
            await who_left_stays_away(cluster)
            await shrink(cluster, 4)
            cluster.check_list(4, [0] * 3)

        @on_loop_for(DEADLINE_S * 8)
        async def use():
            # These know of the first list only, and follow through four more.
            totals = await under_load(cluster, lambda: asyncio.run(walk()))
            await cluster.wait_equal()
            cluster.kill(1)
            async with cluster.client_now() as client:
                for i, total in enumerate(totals):
                    assert await client.incr(f"counter-{i}") == total + 1

        use()
        # One who stayed, one who left last, and one who left before.
        cluster.audit(2, 4, 6)


async def grow(cluster, number_of_list):
    n = cluster.present().genesis.n
    publics = cluster.make_two(n)
    cluster.member("add", cluster.directory, *publics)
    cluster.start(n, n + 1)
    await cluster.until_all_are_over(number_of_list)
    await cluster.agree()


async def shrink(cluster, number_of_list):
    n = cluster.present().genesis.n
    cluster.member("remove", cluster.directory, n - 1, n - 2)
    await cluster.until_they_left((n - 2, n - 1), number_of_list)
    await cluster.agree()


async def what_seven_refuse(cluster):
    """The commands, and the replicas for whoever asks without these commands."""
    assert "which are 5 and 6" in cluster.refused("remove", cluster.directory, 3, 4)
    too_far = cluster.make_two(9)
    assert "must have the numbers 7 and 8" in cluster.refused("add", cluster.directory, *too_far)
    assert "from 7 to 3 replicas: at most two" in await refusal(cluster, seats_of(cluster)[:3])
    assert "2f + 1 replicas" in await refusal(cluster, seats_of(cluster)[:6])
    more = 2 * FAULTS_MAX + 1
    done = cluster.command("keygen", cluster.directory / "too many", "--number", more, "--address", "127.0.0.1:7100")
    assert (done.returncode, f"{more} is not in the range 0<=x<={more - 1}" in done.stderr) == (2, True), done.stderr


async def three_of_seven_are_killed(cluster):
    """All that the clients began with; those who came in serve, and nothing that takes more of them is begun."""
    for number in (0, 1, 2):
        cluster.kill(number)
    await cluster.serves()
    said = cluster.refused("remove", cluster.directory, 5, 6, expected=1)
    assert "2 of the replicas that stay answer, 4 must" in said
    said = cluster.refused("add", cluster.directory, *cluster.make_two(7), expected=1)
    assert "4 of the replicas that stay answer, 5 must" in said
    await cluster.serves()
    cluster.start(0, 1, 2)
    await cluster.until_all_are_over(2)
    await cluster.agree()


async def who_left_stays_away(cluster):
    """The replicas know the logs that went, and take none of them back."""
    publics = [cluster.folder(number) / f"replica-{number}.public.toml" for number in (5, 6, 7, 8)]
    assert "went with list 3: it cannot come back" in cluster.refused("add", cluster.directory, *publics[:2])
    assert "must have the numbers 5 and 6" in cluster.refused("add", cluster.directory, *publics[2:])
