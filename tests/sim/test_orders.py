"""Runs in which faulty clients' keys are revoked and allowed again, and correct clients are listed, under attack."""

import pytest

from replica.sim.run import run_seed
from replica.sim.scenario import ORDERS_FROM, draw

SEEDS = range(ORDERS_FROM, ORDERS_FROM + 40)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in (1, 2, 3))])
def test_who_may_be_a_client_changes_and_correct_clients_are_served(part):
    for seed in SEEDS[part::4]:
        outcome = run_seed(seed)
        assert not outcome.violations, f"trustlog-replica sim --seed {seed}: {outcome.violations}"
        given = sum(outcome.counts[f"clients-{kind}"] for kind in ("revoke", "allow", "listed", "open"))
        assert given == len(draw(seed).orders) > 0


def test_every_kind_of_order_is_drawn():
    assert {order.kind for seed in SEEDS for order in draw(seed).orders} == {"revoke", "allow", "listed", "open"}
    assert not any(draw(seed).orders for seed in range(200))
