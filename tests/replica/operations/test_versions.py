"""What is made of replicas' words about the application's version: f + 1 alike are believed, and all must be ready."""

import pytest

from replica.cluster.clusterfile import ClusterFile
from replica.cluster.provision import init_cluster
from replica.operations.asking import Answer, Outcome
from replica.operations.versions import in_force, not_ready_for, standings


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> ClusterFile:
    made = init_cluster(tmp_path_factory.mktemp("versions") / "c", f=1, base_port=0)
    assert isinstance(made, ClusterFile)
    return made


def answers(cluster: ClusterFile, *said: tuple | None) -> list[Answer]:
    """Return an answer of each replica: its version in force and the one it knows, or None from one that is away."""
    return [
        Answer(place, Outcome.SILENT, "no connection within 5 s")
        if one is None
        else Answer(
            place, Outcome.ANSWERED, report={"application_version": dict(zip(("in_force", "known"), one, strict=True))}
        )
        for place, one in zip(cluster.replicas, said, strict=True)
    ]


@pytest.mark.parametrize(
    ("said", "agreed"),
    [
        (((1, 1), (1, 1), (0, 1)), 1),
        (((0, 1), (0, 0), (9, 9)), 0),
        (((0, 1), (1, 1), None), None),
        (((1, 1), None, None), None),
        (((0, 1), ("0", 1), (None, 1)), None),
    ],
)
def test_in_force_is_what_a_quorum_says_alike(cluster, said, agreed):
    assert in_force(standings(answers(cluster, *said)), cluster.genesis) == agreed


@pytest.mark.parametrize(
    ("said", "against", "enough"),
    [
        (((0, 2), (0, 3), (0, 2)), [], True),
        (((0, 2), (0, 1), (0, 2)), ["replica 1 knows no version above 1"], True),
        (((0, 2), (0, 2), None), ["replica 2 does not answer (no connection within 5 s)"], True),
        (((0, 2), (0, -1), (0, 2)), ["replica 1 does not say which versions it knows"], True),
        (((0, 2), (0, 1), (0, 0)), ["replica 1 knows no version above 1", "replica 2 knows no version above 0"], False),
    ],
)
def test_all_must_know_it_and_a_quorum_by_force(cluster, said, against, enough):
    assert not_ready_for(2, answers(cluster, *said), cluster.genesis) == (against, enough)
