"""A campaign is clean, and fails when something is violated or when something it is about never happened."""

import json
import os

import pytest

from replica.cli.main import main
from replica.sim import campaign as campaigns
from replica.sim.campaign import EXPECTED, EXPECTED_FROM_SEEDS, Summary, campaign
from replica.sim.controls import CONTROLS, patched
from replica.sim.run import run_seed

BROKEN = next(control for control in CONTROLS if control.name == "carry-forgets")


@pytest.fixture
def call(capsys):
    def call_program(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["sim", *(str(argument) for argument in arguments)])
        out, call_program.err = capsys.readouterr()
        return ended.value.code, out

    return call_program


def everything_happened(seeds: int = EXPECTED_FROM_SEEDS) -> Summary:
    summary = Summary(seeds=seeds)
    summary.counts.update(EXPECTED)
    return summary


def test_sixty_seeds_are_clean():
    summary = campaign(0, 60, jobs=os.cpu_count() or 1)
    assert summary.seeds == 60
    assert [campaigns.outcome_as_data(outcome) for outcome in summary.failed] == []


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_hundred_seeds_are_clean_and_everything_happened():
    summary = campaign(0, EXPECTED_FROM_SEEDS, jobs=os.cpu_count() or 1)
    assert summary.seeds == EXPECTED_FROM_SEEDS
    assert [campaigns.outcome_as_data(outcome) for outcome in summary.failed] == []
    assert summary.missing() == []
    assert summary.is_good


@pytest.mark.parametrize("name", EXPECTED)
def test_what_never_happened_is_a_failure(name):
    summary = everything_happened()
    assert summary.is_good
    del summary.counts[name]
    assert summary.missing() == [name]
    assert not summary.is_good


def test_a_few_seeds_need_not_show_everything():
    assert Summary(seeds=EXPECTED_FROM_SEEDS - 1).is_good
    assert not Summary(seeds=EXPECTED_FROM_SEEDS).is_good


@pytest.mark.parametrize("missing", [(), ("carried-null",)], ids=["everything", "one missing"])
def test_exit_code_says_that_something_never_happened(call, monkeypatch, missing):
    summary = everything_happened()
    for name in missing:
        del summary.counts[name]
    monkeypatch.setattr(campaigns, "campaign", lambda *_: summary)
    code, out = call("--seeds", EXPECTED_FROM_SEEDS, "-o", "plain")
    assert code == len(missing)
    assert [line for line in out.splitlines() if "never happened" in line] == [f"never happened: {n}" for n in missing]
    code, out = call("--seeds", EXPECTED_FROM_SEEDS, "-o", "json")
    assert (code, json.loads(out)["never_happened"]) == (len(missing), list(missing))


def test_a_violation_fails_the_campaign_and_says_how_to_replay_it(call):
    arguments = ("--first", BROKEN.seed, "--seeds", 1, "--jobs", 1)
    replay = f"trustlog-replica sim --seed {BROKEN.seed} --trace"
    with patched(*BROKEN.patches()):
        code, out = call(*arguments, "-o", "plain")
        assert code == 1
        assert f"seed {BROKEN.seed} FAILED; replay: {replay}" in out
        assert f"seed {BROKEN.seed} FAILED: " in call.err, "said at once, not only at the end"
        assert "violation agreement at " in out
        code, out = call(*arguments, "-o", "json")
        assert code == 1
        assert [failed["replay"] for failed in json.loads(out)["failed"]] == [replay]
        code, out = call("--seed", BROKEN.seed)
        assert code == 1
        assert "violation agreement at " in out
    code, out = call(*arguments, "-o", "plain")
    assert code == 0
    assert "FAILED" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", 1, "--seeds", 5),
        ("--seed", 4, "--first", 3),
        ("--seed", 4, "--jobs", 1),
        ("--trace",),
        ("--remarks",),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(call, arguments):
    assert call(*arguments)[0] == 2


def test_a_few_seeds_say_that_they_show_little(call):
    code, out = call("--seeds", 1, "--jobs", 1, "-o", "plain")
    assert code == 0
    assert "what never happened was not looked at: that takes 200 seeds" in out
    _, out = call("--seeds", 1, "--jobs", 1, "-o", "json")
    assert json.loads(out)["never_happened_checked"] is False


def test_an_interrupted_campaign_shows_what_was_run(call, monkeypatch):
    def interrupted(seed):
        if seed == 2:
            raise KeyboardInterrupt
        return run_seed(seed)

    monkeypatch.setattr(campaigns, "run_seed", interrupted)
    code, out = call("--seeds", 5, "--jobs", 1, "-o", "plain")
    assert code == 130
    lines = out.splitlines()
    assert "seeds=2" in lines
    assert "interrupted: these are the seeds that were run" in lines


def test_remarks_leave_the_network_out(capsys):
    told = {}
    for option in ("--trace", "--remarks"):
        with pytest.raises(SystemExit):
            main(["sim", "--seed", "1", option])
        told[option] = capsys.readouterr().err.splitlines()
    assert told["--remarks"] == [line.replace("# ", "", 1) for line in told["--trace"] if line.split(" ")[1] == "#"]
    assert any("PREPARE v0 s1" in line for line in told["--remarks"])


def test_counts_are_added_up_and_maxima_kept():
    summary = Summary()
    first, second = run_seed(1), run_seed(2)
    summary.add(first)
    summary.add(second)
    assert summary.seeds == 2
    assert summary.virtual_ms == first.virtual_ms + second.virtual_ms
    assert summary.counts["slots"] == first.counts["slots"] + second.counts["slots"]
    assert summary.counts["heal-ms-max"] == max(first.counts["heal-ms-max"], second.counts["heal-ms-max"])
