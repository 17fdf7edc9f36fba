"""What an operation costs by the number of replicas: roles, ratios and what is said of them; real clusters for a moment."""

import re

import click
import pytest
from click.testing import CliRunner

from client.measure import Load, Run, summarise
from tests.bench import members
from tests.bench.members import Members, by_role, cell_of, clusters, growth, page_of, view_of
from tests.bench.report import RESULTS, marks
from tests.bench.rounds import Plan, Results


def level_of(at_once, n, backups, leader=9.0):
    """Return a run's figures, in which the backups' costs are these and every log's is a tenth of its number."""
    costs = {"primary": leader, "client": 3.0}
    costs |= {f"backup {number}": cost for number, cost in enumerate(backups, 1)}
    costs |= {f"log {number}": number / 10 for number in range(n)}
    return summarise(Load(at_once), [Run(1234, 1.0, 2.0, 9.0, costs, others_cpus=0.25)])


def results_of(costs, ordering="two-phase", failures=()):
    """Return results in which all backups of a cluster cost the same: {(n, operations at once): µs}."""
    levels = {
        (Members(n, ordering).name, cell_of(at_once)): level_of(at_once, n, [cost] * (n - 1))
        for (n, at_once), cost in costs.items()
    }
    return Results(levels, list(failures))


def page(costs, sizes=(3, 9), levels=(1, 200), failures=(), **left):
    systems = clusters(sizes, ["two-phase"])
    for system in systems:
        system.views_left = left.get(f"n{system.n}", 0)
    plan = Plan((members.VALUE_BYTES,), levels, (), 2, 3.0)
    return page_of(systems, plan, results_of(costs, failures=failures), "here")


def test_processes_are_named_by_what_they_do():
    pids = {"replica 0": 10, "log 0": 20, "replica 1": 11, "log 1": 21, "replica 2": 12, "log 2": 22}
    roles = {"backup 1": 10, "primary": 11, "backup 2": 12}
    assert by_role(pids, 1) == {**roles, "log 0": 20, "log 1": 21, "log 2": 22}


def test_of_backups_and_logs_the_median_one_is_shown():
    small, large = Members(3, "two-phase"), Members(5, "two-phase")
    levels = {
        (small.name, cell_of(1)): level_of(1, 3, [10, 20]),
        (large.name, cell_of(1)): level_of(1, 5, [40, 1, 20, 1000]),
    }
    results = Results(levels, [])
    assert growth(large, small, 1, results) == 2.0
    assert members.row_of(large, small, 1, results) == [
        *("two-phase", "5", "1", "1,234", "2.0", "9.0", "30.0", "0.2", "3.0"),
        *("2.00x", "1.67x"),
    ]


def test_a_cost_that_grows_with_n_at_small_load_and_not_at_full_batches_is_as_wanted():
    lines = page({(3, 1): 100, (9, 1): 300, (3, 200): 20, (9, 200): 25}).splitlines()
    assert "| two-phase | 9 | 1 | 1,234 | 2.0 | 9.0 | 300.0 | 0.4 | 3.0 | 3.00x | 3.00x |" in lines
    assert "| two-phase | 3 | 200 | 1,234 | 2.0 | 9.0 | 20.0 | 0.1 | 3.0 | 1.00x | 1.00x |" in lines
    assert (
        "- A backup's cost per operation, two-phase: with 1 at once it grows at most in proportion to n: yes (n = 9: 3.00x, at "
        "most 3.00x); with 200 at once it stays flat: yes (n = 9: 1.25x, at most 1.25x)."
    ) in lines
    assert lines[-1].startswith("No view was left. Programs outside the measurement kept 0.25 processors busy")
    assert lines[-1].endswith(" here")


def test_a_cost_that_grows_too_much_is_said_of_the_size_where_it_does_most():
    said = page(
        {(3, 1): 100, (5, 1): 200, (9, 1): 301, (3, 200): 20, (5, 200): 26, (9, 200): 25.5},
        sizes=(9, 3, 5),
    )
    assert "with 1 at once it grows at most in proportion to n: no (n = 5: 2.00x, at most 1.67x)" in said
    assert "with 200 at once it stays flat: no (n = 5: 1.30x, at most 1.25x)" in said


def test_what_was_not_measured_is_no_figure_and_proves_nothing():
    said = page({(3, 1): 100, (9, 1): 300, (3, 200): 20}, failures=["round 1: two-phase, n = 9: why"], n9=2)
    assert "| two-phase | 9 | 200 | - | - | - | - | - | - | - | 3.00x |" in said
    assert "with 200 at once it stays flat: not known, as n = 9 was not measured" in said
    assert "- failed in round 1: two-phase, n = 9: why" in said
    assert "Views that were left, which mixes up primary and backups: two-phase, n = 9: 2." in said
    assert "not known, as more than n = 3 was not measured" in page({(3, 1): 100}, sizes=(3,), levels=(1,))


def test_clusters_have_an_odd_number_of_replicas_and_their_faults():
    assert [(one.n, one.faults, one.ordering) for one in clusters((5, 3, 5), ("three-phase",))] == [
        (3, 1, "three-phase"),
        (5, 2, "three-phase"),
    ]
    with pytest.raises(click.BadParameter, match="n = 2f\\+1 is odd, 4 is not"):
        clusters((3, 4), ("two-phase",))


def test_the_results_have_a_place():
    assert all(RESULTS.read_text().count(mark) == 1 for mark in marks("members"))


@pytest.mark.long
def test_real_clusters_of_two_sizes_are_measured(tmp_path, monkeypatch):
    views = []
    monkeypatch.setattr(members, "view_of", lambda found: views.append(view_of(found)) or views[-1])
    options = ["--n", "5", "--n", "3", "--level", "4", "--rounds", "1", "--seconds", "0.5"]
    done = CliRunner().invoke(members.main, [*options, "--ordering", "two-phase", "--dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    figure = r"[\d,.]+ \| "
    assert re.search(rf"\| two-phase \| 3 \| 4 \| {6 * figure}1\.00x \| 1\.00x \|", done.stdout)
    assert re.search(rf"\| two-phase \| 5 \| 4 \| {6 * figure}\d+\.\d\dx \| 1\.67x \|", done.stdout)
    assert re.search(r"with 4 at once it grows at most in proportion to n: (yes|no) \(n = 5", done.stdout)
    assert len(views) == 4  # before and after, while the replicas ran
    assert list(tmp_path.iterdir()) == []
