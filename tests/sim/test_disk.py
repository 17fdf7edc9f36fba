"""The simulated disk: what damage does to it, and that whoever reads it notices."""

import random

import pytest

from replica.apps.kv import KeyValue
from replica.core.genesis import Ordering
from replica.sim.disk import Damage, Disk
from replica.sim.stage import Stage
from replica.sim.stories_recovery import STORIES, CutAmidVotes

STORY = next(story for story in STORIES if story.name == "votes_in_flight")
IN_MILESTONES = (Damage.STATE, Damage.LOG_STATES, Damage.BATCHES, Damage.CERTIFICATE)
IN_GROUPS = (Damage.OTHERS_LOG, Damage.OWN_LOG, Damage.TORN, Damage.MISDIRECTED)


@pytest.fixture
def stored(monkeypatch):
    """A stage, and a disk of replica 3 whose milestone has votes and batches in flight."""
    stage, disks = Stage(STORY, Ordering.THREE_PHASE), []
    end = CutAmidVotes._end

    def seen(story):
        disks.append(stage.replicas[3].disk.copy())
        end(story)

    monkeypatch.setattr(CutAmidVotes, "_end", seen)
    assert stage.play().violations == ()
    return stage, disks[0]


def snapshot(stage: Stage, disk: Disk):
    return disk.kept.snapshot(stage.setting.genesis, KeyValue(), stage.setting.verifier.entry)


def test_a_milestone_is_read_back(stored):
    stage, disk = stored
    assert snapshot(stage, disk).header.slot == 4
    assert snapshot(stage, disk).batches


@pytest.mark.parametrize("damage", IN_MILESTONES)
def test_every_flipped_bit_in_a_milestone_is_noticed(stored, damage):
    stage, disk = stored
    for seed in range(50):
        hit = disk.copy()
        assert hit.damage(damage, random.Random(seed))
        assert snapshot(stage, hit) is None


@pytest.mark.parametrize("damage", IN_GROUPS)
def test_damaged_groups_are_noticed_and_left_out(stored, damage):
    stage, disk = stored
    whole, noticed = disk.read(stage.setting.verifier.group)
    assert not noticed
    for seed in range(50):
        hit = disk.copy()
        if hit.damage(damage, random.Random(seed)):
            groups, noticed = hit.read(stage.setting.verifier.group)
            assert noticed == 1
            assert len(groups) < len(whole)
            assert all(group in whole for group in groups)


def test_what_was_not_durable_may_be_lost(stored):
    stage, disk = stored
    whole, _ = disk.read(stage.setting.verifier.group)
    fresh = Disk()
    for group in whole:
        fresh.receive(group, owner=3)
    fresh.crash(random.Random(1))
    left, _ = fresh.read(stage.setting.verifier.group)
    own = [group for group in whole if group.author == 3]
    assert len(own) <= len(left) < len(whole)
    assert left[: len(own)] == own


def test_a_disk_can_be_gone(stored):
    stage, disk = stored
    assert disk.damage(Damage.DISK, random.Random(1))
    assert disk.kept is None
    assert disk.read(stage.setting.verifier.group) == ([], 0)
