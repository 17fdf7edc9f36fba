"""What an operator meets: status, health and doctor against real replicas that run, stopped, hang, or have wrong files."""

import datetime as dt
import json
import os
import re
import shutil
import signal
import socket

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from replica.cli.main import main
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.keys import certificate_pem, load_private_key
from replica.cluster.provision import init_cluster
from tests.support.cluster import Processes
from tests.support.ports import free_port
from tests.support.waiting import on_loop, wait_for

pytestmark = pytest.mark.cluster


@pytest.fixture
def call(capsys):
    def call_program(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, *capsys.readouterr()

    return call_program


@pytest.fixture
def doctor(call):
    """Run the doctor; return its exit code, and its findings that are not ok, as check, severity, subject, text."""

    def examine(folder, *options):
        code, out, err = call("doctor", folder, "-o", "json", *options)
        assert err == ""
        findings = [one for one in json.loads(out)["findings"] if one["severity"] != "ok"]
        assert all(one["remedy"] for one in findings)
        return code, findings

    return examine


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("o") / "c") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def work():
            async with cluster.client() as client:
                for number in range(5):
                    await client.put(f"k{number}", "v")
            await cluster.wait_equal()

        work()
        yield cluster


def of(findings, check):
    return [one for one in findings if one["check"] == check]


# While all is well


def test_a_cluster_that_is_well(running, call, doctor):
    for number in range(3):
        wait_for(lambda number=number: call("health", running.folder(number))[0] == 0, "healthy")
        code, findings = doctor(running.folder(number))
        assert (code, [one for one in findings if one["check"] != "disk"]) == (0, [])
    code, out, _ = call("status", running.directory, "-o", "json")
    found = json.loads(out)
    executed = [one["report"]["executed"] for one in found["replicas"]]
    assert (code, found["serves"], found["reachable"], found["known"]) == (0, True, 3, max(executed))
    assert min(executed) >= 6
    assert all(abs(one["clock_ahead_ms"]) < 1000 for one in found["replicas"])
    code, out, _ = call("status", running.folder(1), "-o", "plain")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [len(row) for row in rows] == [13, 13, 13]
    assert sorted(row[1] for row in rows) == ["*", "-", "-"]
    assert all(float(row[9]) > 0 and float(row[10]) > 0 for row in rows)
    code, out, _ = call(
        "status", running.directory / "cluster.toml", "-o", "table", "--watch", "--count", "2", "--interval", "0.1"
    )
    assert code == 0
    assert out.count("3 of 3 replicas answer") == 2, "a file has every round"
    assert out.endswith("\n")
    code, out, _ = call("status", running.directory, "-o", "plain", "--watch", "--count", "2", "--interval", "0.1")
    rounds = [line for line in out.splitlines() if line.startswith("# ")]
    assert (code, len(rounds), len(out.splitlines())) == (0, 2, 8)
    assert all(dt.datetime.fromisoformat(line.removeprefix("# ")).tzinfo for line in rounds)
    code, out, _ = call("health", running.folder(0), "-o", "json")
    assert (code, json.loads(out)["ready"], json.loads(out)["problem"]) == (0, True, None)


def test_one_that_hangs_is_unhealthy_within_the_deadline(running, call):
    os.kill(running.pid(2), signal.SIGSTOP)
    try:
        code, out, _ = call("health", running.folder(2), "--deadline", "0.5")
        assert code == 1
        assert "within 0.5 s" in out
        code, out, _ = call("health", running.folder(2), "--live", "--deadline", "0.5", "-o", "json")
        assert (code, json.loads(out)["live"]) == (1, False)
        code, out, _ = call("status", running.directory, "--deadline", "4", "-o", "plain")
        assert code == 0
        assert "silent: no connection within 4 s" in out.splitlines()[2]
    finally:
        os.kill(running.pid(2), signal.SIGCONT)
    wait_for(lambda: call("health", running.folder(2))[0] == 0, "healthy again")


# When something is wrong


def test_a_stopped_peer_and_then_no_quorum(tmp_path, call, doctor):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        cluster.kill(2, signal.SIGTERM)
        code, findings = doctor(cluster.folder(0))
        assert code == 1
        (peer,) = of(findings, "peer")
        assert "nothing listens at" in peer["text"]
        assert "trustlog-replica run" in peer["remedy"]
        assert of(findings, "link")
        code, findings = doctor(cluster.folder(2))
        assert code == 0, findings
        (own,) = of(findings, "replica")
        assert (own["severity"], own["text"]) == ("warning", "this replica does not run")
        assert call("health", cluster.folder(2))[0] == 1
        cluster.kill(1)
        assert call("status", cluster.directory)[0] == 3
        lonely = "0 other replicas are connected, 1 are needed"
        wait_for(lambda: lonely in call("health", cluster.folder(0))[1], "it notices")
        assert call("health", cluster.folder(0))[0] == 1
        assert call("health", cluster.folder(0), "--live")[0] == 0


def test_a_peer_with_another_cluster_file(tmp_path, doctor):
    """Outside the agreed part: named with both digests by the doctor, by status, and in the log at connection time."""
    with Processes(tmp_path / "c") as cluster:
        own = cluster.folder(2) / "cluster.toml"
        own.write_text((cluster.directory / "cluster.toml").read_text() + "# mended by hand\n")
        settings = cluster.folder(2) / "replica.toml"
        settings.write_text(settings.read_text().replace('"../cluster.toml"', '"cluster.toml"'))
        cluster.start_and_wait()
        digests = [load_cluster_file(path).digest.hex() for path in (cluster.directory, own)]
        code, findings = doctor(cluster.folder(0))
        assert code == 1
        (found,) = of(findings, "cluster-file")
        assert all(digest in found["text"] for digest in digests)
        assert "replica 2" in found["subject"]
        for number in (0, 2):
            cluster.wait_logged(number, digests[0])
            cluster.wait_logged(number, digests[1])


def test_a_peer_of_another_cluster_with_other_keys(tmp_path, doctor):
    """The first failure that everybody meets: both certificates' digests are named, by the doctor and in the log."""
    with Processes(tmp_path / "c") as cluster:
        init_cluster(tmp_path / "other", base_port=0)
        places = [load_cluster_file(path).replicas[2] for path in (cluster.directory, tmp_path / "other")]
        settings = tmp_path / "other" / "replica-2" / "replica.toml"
        settings.write_text(f'listen = "{places[0].address}"\n' + settings.read_text())
        shutil.rmtree(cluster.folder(2))
        shutil.copytree(tmp_path / "other" / "replica-2", cluster.folder(2))
        shutil.copy(tmp_path / "other" / "cluster.toml", cluster.folder(2) / "cluster.toml")
        settings = cluster.folder(2) / "replica.toml"
        settings.write_text(settings.read_text().replace('"../cluster.toml"', '"cluster.toml"'))
        cluster.start()
        for number in (1, 2):  # or the doctor rightly says that it is not there
            cluster.wait_logged(number, "listening")
        digests = [place.fingerprint.hex() for place in places]
        for digest in digests:
            cluster.wait_logged(0, digest)
        code, findings = doctor(cluster.folder(0))
        assert code == 1
        (found,) = of(findings, "peer")
        assert "replica 2" in found["subject"]
        assert all(digest in found["text"] for digest in digests)


def expire(cluster, number):
    """Give a replica a certificate that ended yesterday, and everybody the cluster.toml that lists it."""
    folder = cluster.folder(number)
    key = load_private_key(folder / "tls.key")
    old = cluster.cluster.replicas[number].certificate_der
    before = x509.load_der_x509_certificate(old)
    builder = x509.CertificateBuilder(before.issuer, before.subject, key.public_key(), before.serial_number)
    ends = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    builder = builder.not_valid_before(dt.datetime(2020, 1, 1, tzinfo=dt.UTC)).not_valid_after(ends)
    for extension in before.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    new = builder.sign(key, hashes.SHA256())
    pem = certificate_pem(new.public_bytes(Encoding.DER))
    (folder / "tls.crt").write_text(pem)
    file = cluster.directory / "cluster.toml"
    changed = file.read_text().replace(certificate_pem(old), pem)
    assert changed != file.read_text()
    file.write_text(changed)


def test_an_expired_certificate(tmp_path, doctor):
    with Processes(tmp_path / "c") as cluster:
        expire(cluster, 1)
        code, findings = doctor(cluster.folder(0), "--offline")
        (found,) = of(findings, "certificate")
        assert (code, found["subject"], found["severity"]) == (1, "replica 1's certificate", "problem")
        assert found["text"].startswith("expired on ")
        cluster.start()
        cluster.wait_logged(0, "certificate has expired")
        cluster.wait_logged(1, "listening")
        cluster.wait_logged(2, "listening")
        code, findings = doctor(cluster.folder(0))
        (peer,) = of(findings, "peer")
        assert "certificate has expired" in peer["text"]


def test_a_folder_with_damage(tmp_path, doctor):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        for number in range(3):
            cluster.kill(number, signal.SIGTERM)
        folder = cluster.folder(0)
        assert doctor(folder, "--offline")[0] == 0
        (folder / "tls.key").chmod(0o644)
        code, findings = doctor(folder, "--offline")
        assert code == 1
        assert [one["subject"] for one in of(findings, "mode")] == [str(folder / "tls.key")]
        assert "chmod 600" in of(findings, "mode")[0]["remedy"]
        (folder / "tls.key").chmod(0o600)
        store = folder / "store.sqlite"
        whole = store.read_bytes()
        store.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
        code, findings = doctor(folder, "--offline")
        assert (code, [one["subject"] for one in of(findings, "database")]) == (1, [str(store)])
        store.write_bytes(whole)
        (folder / "log" / "seal.key").rename(tmp_path / "kept")
        code, findings = doctor(folder, "--offline")
        (found,) = of(findings, "log")
        assert "never put an old copy there" in found["remedy"]
        (tmp_path / "kept").rename(folder / "log" / "seal.key")
        settings = folder / "replica.toml"
        settings.write_text("retain_mb = 5\n" + settings.read_text())
        code, findings = doctor(folder)
        assert (code, len(of(findings, "configuration"))) == (1, 1)
        assert '"retain_mib"' in of(findings, "configuration")[0]["text"]


def test_somebody_else_has_the_port_and_http_is_open_to_all(tmp_path, doctor):
    with Processes(tmp_path / "c") as cluster:
        settings = cluster.folder(0) / "replica.toml"
        settings.write_text(f'http = "0.0.0.0:{free_port()}"\n' + settings.read_text())
        place = cluster.cluster.replicas[0]
        with socket.create_server((place.host, place.port)):
            code, findings = doctor(cluster.folder(0), "--deadline", "0.3")
        assert code == 1
        (own,) = of(findings, "replica")
        assert "another program listens there" in own["text"]
        assert "ss -ltnp" in own["remedy"]
        assert [one["severity"] for one in of(findings, "port")] == ["warning"]


def test_a_file_that_was_changed_under_a_running_replica(tmp_path, doctor):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        with (cluster.directory / "cluster.toml").open("a") as file:
            file.write("# changed\n")
        code, findings = doctor(cluster.folder(1))
        assert code == 1
        assert "the running replica read" in of(findings, "replica")[0]["text"]


def without_figures(text: str) -> str:
    """Free space and clocks move between two calls."""
    return re.sub(r"\d+", "#", text)


def test_plain_and_table_say_the_same(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        code, out, _ = call("doctor", cluster.folder(0), "-o", "plain")
        assert code == 1
        rows = [line.split("\t") for line in out.splitlines()]
        assert {len(row) for row in rows} == {5}
        _, out, _ = call("doctor", cluster.folder(0), "-o", "table")
        shown = re.sub(r"\s+", " ", out)
        problems = sum(1 for row in rows if row[0] == "problem")
        assert problems >= 2
        assert f"{len(rows)} checks: {problems} problems" in shown
        for row in rows:
            assert without_figures(row[3]) in without_figures(shown)
