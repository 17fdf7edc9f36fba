"""What a million keys change: ratios, thirds, what is said of them and of a late replica; real clusters for a moment."""

import re
import tomllib

import pytest
from click.testing import CliRunner

from client.measure import Run
from client.soak import MIB, Cluster
from client.workload import Recording
from tests.bench import keys
from tests.bench.keys import Figures, Plan, growth, page_of
from tests.bench.report import RESULTS, marks
from tests.bench.stored import Loaded, Return, Size, Stored, backups_of, is_level, leader_of

PLAN = Plan(few=1000, many=5000, puts=7000, rounds=2, seconds=3.0, restarts=1, ordering="two-phase", retain_mib=16)


def run_of(operations, p99_ms, backup_us, others=0.25):
    costs = {"primary": 30.0, "backup 1": backup_us, "backup 2": backup_us, "log 0": 2.0, "client": 10.0}
    return Run(operations, 1.0, 10.0, p99_ms, costs, others_cpus=others)


def cluster_of(stored, runs, memory, disk, views=0):
    loaded = Loaded(runs, [200.0, 300.0], [8.0, 9.0], views)
    return keys.Cluster(stored, Size(10 * MIB, MIB), Size(memory, disk), loaded)


def recording_of(operations, seconds, latency_s):
    found = Recording(seconds, operations)
    found.latencies.record(latency_s)
    return found


def back_of(**other):
    latencies = {"before": 0.01, "alone": 0.02, "meanwhile": 0.05, "after": 0.03, "vote": 0.25}
    loads = {name: recording_of(1234, 2.0, latency) for name, latency in latencies.items()}
    loads["before"].operations = 10
    moved = {"part_bytes": 3 * MIB, "buckets": 400, "bucket_keys": 1500}
    found = {"changed": 500, "behind": 2048, "loads": loads, "installed_s": 3.21, "level_s": 7.89}
    return Return(**{**found, "transfers": [moved], "memory": 99 * MIB, "memory_most": 200 * MIB, **other})


def figures_of(rates=(900, 850), p99=(11.0, 12.0), memory=14 * MIB, grows=0, back=None, took=(2.0, 10.0)):
    few = cluster_of(1000, [run_of(1000, 10.0, 20.0)] * 2, 12 * MIB, 2 * MIB, views=1)
    many = cluster_of(
        5000, [run_of(*one, 25.0, 0.75) for one in zip(rates, p99, strict=True)], memory, 4 * MIB, views=2
    )
    sizes = [Size((100 + grows * step) * MIB, 0) for step in range(13)]
    found = {(1000, 100): 2.0, (1000, 1000): 3.0, (5000, 100): 3.0, (5000, 1000): 3.6}
    return Figures(few, many, sizes, {"5,000 keys, no load": list(took)}, back or back_of(), 437.5, found)


def lines_of(**other):
    return page_of(figures_of(**other), PLAN, "here").splitlines()


def test_the_load_is_compared_by_medians_and_round_by_round():
    lines = lines_of()
    assert "| 1,000 | 1,000 | 10.0 | 10.0 | 30.0 | 20.0 | 2.0 | 10.0 | 250 | 8 |" in lines
    assert "| 5,000 | 875 | 10.0 | 11.5 | 30.0 | 25.0 | 2.0 | 10.0 | 250 | 8 |" in lines
    assert "| ratio | 0.88x | 1.00x | 1.15x | 1.00x | 1.25x | 1.00x | 1.00x | 1.00x | 1.00x |" in lines
    assert (
        "- With 5,000 keys against 1,000: throughput within 20%: yes (0.88x); p99 within 20%: yes (1.15x). Throughput in each "
        "round: 0.90, 0.85 times."
    ) in lines
    assert "- 3 views were left meanwhile, which mixes up primary and backups." in lines
    assert lines[-1].startswith("Programs outside the measurement kept 0.50 processors busy (median; at most 0.75)")
    assert lines[-1].endswith(" here")


def test_what_is_worse_by_more_than_a_fifth_is_not_within_it():
    said = "\n".join(lines_of(rates=(790, 790), p99=(12.1, 12.1)))
    assert "throughput within 20%: no (0.79x); p99 within 20%: no (1.21x)" in said
    assert "throughput within 20%: yes (2.00x); p99 within 20%: yes (0.50x)" in "\n".join(
        lines_of(rates=(2000, 2000), p99=(5.0, 5.0))
    )


def test_a_checkpoint_is_judged_where_it_costs_most_more():
    (line,) = [line for line in lines_of() if line.startswith("- A checkpoint's")]
    assert "5,000 keys stored and 100 changed: 3.0" in line
    assert line.endswith("at most 1.50 times that with 1,000 keys, for 5 times the keys.")


def test_a_key_takes_what_tells_the_clusters_apart():
    lines = lines_of(memory=12 * MIB + 4000 * 300)
    assert "| 1,000 | 10 | 12 | 1 | 2 |" in lines
    assert "| 5,000 | 10 | 13 | 1 | 4 |" in lines
    assert "- A key of 16 bytes with 100 bytes takes 300 bytes of memory and 524 on the disk." in lines


def test_memory_is_flat_if_its_last_third_is_as_its_middle_third():
    warm_up = [Size(memory, 0) for memory in (10, 50, 70, 80)]
    level = [Size(memory, 0) for memory in (100, 90, 100, 110, 100)]
    assert growth([*warm_up, *level, *(Size(memory, 0) for memory in (100, 120, 110, 110))]) == pytest.approx(1.1)
    assert any("flat after warm-up: yes (last third 1.00 times" in line for line in lines_of())
    assert any("flat after warm-up: no (last third 1.08 times" in line for line in lines_of(grows=2))


def test_a_start_is_as_quick_as_the_slowest_one():
    assert "| 5,000 keys, no load | 6.0 | 2.0, 10.0 | yes |" in lines_of()
    assert "| 5,000 keys, no load | 6.1 | 2.0, 10.2 | no |" in lines_of(took=(2.0, 10.2))


def test_a_return_is_told_with_what_was_fetched_and_kept():
    lines = lines_of()
    assert "| vote | 2.0 | 1,234 | 250.0 | 250.0 | 250.0 |" in lines
    said = "\n".join(lines)
    assert "- 2,048 slots behind, it was ready and level with the others" in said
    assert "7.9 s after its start; the state was installed after 3.2 s." in said
    one = "3.0 MiB, 400 of 65,536 buckets with 1,500 keys (the other 3,500 were kept)"
    assert f"- Fetched in 1 transfer(s): {one}. 6,291 bytes per changed key." in said
    assert "- Its memory then: 99 MiB; the most since its start: 200 MiB." in lines
    assert "- Clients' p99 was 50.0 ms while it came back, 2.5 times that while it was stopped." in lines
    assert lines[-3].endswith("1,234 puts were done.")


def test_every_transfer_is_told():
    twice = [
        {"part_bytes": MIB, "buckets": 1, "bucket_keys": 2},
        {"part_bytes": 2 * MIB, "buckets": 3, "bucket_keys": 4},
    ]
    said = "\n".join(lines_of(back=back_of(transfers=twice)))
    assert "in 2 transfer(s): 1.0 MiB, 1 of 65,536 buckets with 2 keys" in said
    assert "; 2.0 MiB, 3 of 65,536 buckets with 4 keys (the other 4,996 were kept). 6,291 bytes per" in said


def test_a_return_without_a_transfer_says_nothing_of_one():
    said = "\n".join(lines_of(back=back_of(transfers=[], installed_s=None)))
    assert "the state was installed never" in said
    assert "It fetched no state" in said


def report(view, primary, executed=7, not_ready=None):
    return {"view": view, "primary": primary, "executed": executed, "not_ready": not_ready}


def test_the_primary_is_that_of_the_highest_view():
    reports = {0: report(3, 0), 1: report(4, 1), 2: report(3, 0)}
    assert leader_of(reports) == 1
    assert backups_of(reports) == [0, 2]


def test_level_is_who_is_ready_and_has_what_others_had_before():
    others = [report(0, 0, 10), report(0, 0, 12)]
    assert is_level(report(0, 0, 12), others)
    assert not is_level(report(0, 0, 11), others)
    assert not is_level(report(0, 0, 12, "fetching"), others)
    assert not is_level(None, others)
    assert not is_level(report(0, 0, 12), [])


def test_as_many_keys_are_touched_however_many_there_are():
    few, many = object.__new__(Stored), object.__new__(Stored)
    few.keys, many.keys = 3, 10
    assert few.chosen(3) == few.chosen(9) == [b"%016d" % number for number in range(3)]
    assert many.chosen(3) == [b"%016d" % number for number in (0, 3, 6)]


def test_settings_come_before_the_first_table(tmp_path):
    (tmp_path / "replica-1").mkdir()
    settings = tmp_path / "replica-1" / "replica.toml"
    settings.write_text('number = 1\n[trusted_log]\nbackend = "process"\n')
    Cluster(tmp_path).configure(1, retain_mib=4, http="127.0.0.1:80")
    read = tomllib.loads(settings.read_text())
    assert read == {"number": 1, "retain_mib": 4, "http": "127.0.0.1:80", "trusted_log": {"backend": "process"}}


def test_the_cluster_with_many_keys_has_more():
    done = CliRunner().invoke(keys.main, ["--few", "10", "--many", "10"])
    assert done.exit_code == 2
    assert "10 are not fewer than 10" in done.output


def test_the_results_have_a_place():
    assert all(RESULTS.read_text().count(mark) == 1 for mark in marks("keys"))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_real_clusters_are_filled_and_a_replica_fetches_what_it_missed(tmp_path):
    options = ["--few", "300", "--many", "3000", "--rounds", "1", "--seconds", "0.5", "--restarts", "1"]
    done = CliRunner().invoke(keys.main, [*options, "--retain-mib", "0", "--dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    figure = r" [\d,.]+ \|"
    assert re.search(rf"^\| 300 \|{9 * figure}$", done.stdout, re.MULTILINE)
    assert re.search(rf"^\| 3,000 \|{9 * figure}$", done.stdout, re.MULTILINE)
    assert (
        len(re.findall(rf"^\| 3?,?[03]00 keys, .* \|{figure}{figure} (?:yes|no) \|$", done.stdout, re.MULTILINE)) == 3
    )
    fetched = re.findall(r"of 65,536 buckets with ([\d,]+) keys", done.stdout)
    assert fetched
    assert all(int(keys.replace(",", "")) >= 300 for keys in fetched)  # those that were changed
    assert re.search(r"the state was installed after [\d.]+ s", done.stdout)
    assert not re.search(r"without its vote, 0 puts", done.stdout)
    assert list(tmp_path.iterdir()) == []
