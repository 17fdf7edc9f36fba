"""What `member list` makes of what single replicas say."""

from types import SimpleNamespace

import pytest

from replica.cli.member import _agreed_end
from replica.operations.asking import Answer, Outcome


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([(1, 48), (1, 48), (1, None)], 48),
        ([(1, 48), (1, 64), (1, None)], None),
        ([(1, 64), (1, 48), (1, 48)], 48),
        ([(0, 48), (1, 48), (1, None)], None),
        ([(1, "48"), (1, "48"), None], None),
    ],
)
def test_a_list_follows_when_f_plus_1_replicas_say_alike_after_which_slot(said, expected):
    present = SimpleNamespace(genesis=SimpleNamespace(list_number=1, quorum=2))
    reports = [{} if one is None else {"members": {"list": one[0], "ends": one[1]}} for one in said]
    answers = [Answer(None, Outcome.ANSWERED, report=report) for report in reports]
    assert _agreed_end(present, answers) == expected
