"""A cluster that has ordered something and stands still, as a folder that each test gets a copy of."""

import shutil
from pathlib import Path

import pytest

from replica.core.genesis import Limits
from replica.core.snapshot import MilestoneRule
from replica.shell import keeper, streams
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a cluster that has ordered something and stands still now."""

    @on_loop
    async def make():
        async with Nodes(directory) as cluster:
            cluster.start()
            await cluster.wait_ready()
            async with cluster.client() as client:
                for number in range(8):
                    await client.put(str(number), "x" * 50)
            await cluster.wait_quiet()

    directory = tmp_path_factory.mktemp("model") / "c"
    make()
    return directory


@pytest.fixture
def cluster(model, tmp_path) -> Nodes:
    """A copy of it that a test may damage."""
    return Nodes(Path(shutil.copytree(model, tmp_path / "c")))


@pytest.fixture
def small(tmp_path, monkeypatch) -> Nodes:
    """A cluster with a milestone every 8 slots, which keeps nothing that a milestone covers."""
    monkeypatch.setattr(streams, "RECENT_BYTES_MAX", 0)
    monkeypatch.setattr(keeper, "LEASE_S", 0.5)  # a test is away more than once
    limits, rule = Limits(checkpoint_interval=4, window=8), MilestoneRule(intervals=2)
    made = Nodes(tmp_path / "small", limits=limits, milestones=rule)
    made.set(retain_mib=0)
    return made
