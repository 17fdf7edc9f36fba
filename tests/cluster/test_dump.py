"""The dump for a bug report: it holds what helps, and no key, whatever is put into it."""

import base64
import json
import re
import signal
import tarfile

import pytest

from replica.cluster.keys import load_private_key
from tests.support.calling import json_caller
from tests.support.cluster import Processes
from tests.support.keymaterial import exposed_in, forms, scalar, secrets_of
from tests.support.ports import free_port
from tests.support.waiting import on_loop
from trustlog import BackendKind

pytestmark = pytest.mark.cluster


@pytest.fixture
def call(capsys):
    return json_caller(capsys)


def parts_of(archive):
    with tarfile.open(archive) as opened:
        return {member.name.removeprefix("trustlog-dump/"): opened.extractfile(member).read() for member in opened}


@pytest.mark.parametrize("kind", [BackendKind.SOFTWARE, BackendKind.PROCESS])
def test_a_dump_of_a_running_replica(tmp_path, call, kind):
    secret_value = "only-the-application-knows-this-value"
    with Processes(tmp_path / "c", log_kind=kind) as cluster:
        folder = cluster.folder(1)
        settings = folder / "replica.toml"
        settings.write_text(f'http = "127.0.0.1:{free_port()}"\n' + settings.read_text())
        cluster.start_and_wait()

        @on_loop
        async def work():
            async with cluster.client() as client:
                await client.put("key-of-a-user", secret_value)
            await cluster.wait_equal()

        work()
        code, done = call("debug", "dump", folder, tmp_path / "dump", "--log", cluster.log_path(1))
        assert code == 0, done
        assert (tmp_path / "dump").stat().st_mode & 0o777 == 0o600
        cluster.kill(1, signal.SIGTERM)
        parts = parts_of(tmp_path / "dump")
        assert set(parts) == set(done["holds"])
        assert len(json.loads(parts["status.json"])) == 3
        assert all(one["report"]["executed"] >= 2 for one in json.loads(parts["status.json"]))
        assert json.loads(parts["about.json"])["packages"]["trustlog"]
        assert json.loads(parts["databases.json"])["store.sqlite"]["logs"]
        assert re.search(rb"^trustlog_executed [1-9]", parts["metrics.txt"], re.MULTILINE)
        assert b"listening" in parts["logs/0-replica-1.stderr"]
        assert {one["check"] for one in json.loads(parts["doctor.json"])} >= {"mode", "certificate", "peer"}
        # No key in any form, and nothing of what users stored.
        whole = b"\n".join(parts.values())
        secrets = secrets_of(folder)
        secrets["the client's key"] = forms(scalar(load_private_key(cluster.directory / "client" / "client.key")))
        assert exposed_in(whole, secrets) == []
        assert secret_value.encode() not in whole
        assert b"key-of-a-user" not in whole
        # The search finds each of them if it is there.
        for name, known in secrets.items():
            assert name in exposed_in(whole + min(known), secrets), name


def test_a_log_that_holds_a_key_is_refused(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        folder = cluster.folder(0)
        seal = (folder / "log" / "seal.key").read_bytes()
        pem = (folder / "tls.key").read_bytes()
        secret = scalar(load_private_key(folder / "tls.key"))
        for number, text in enumerate(
            [
                seal,
                b"key=" + seal.hex().encode() + b"\n",
                b"x" + seal[5:25].hex().upper().encode(),
                base64.b64encode(b"?" + seal),
                pem,
                pem.splitlines()[1],
                secret.hex().encode(),
                base64.b64encode(secret),
            ]
        ):
            log = tmp_path / f"log-{number}"
            log.write_bytes(b"an ordinary line\n" + text + b"\nanother\n")
            code, done = call("debug", "dump", folder, tmp_path / "dump", "--log", log)
            assert (code, done["error"]["code"]) == (1, "dump"), number
            assert f"logs/0-log-{number} would hold a part of" in done["error"]["message"]
            assert not (tmp_path / "dump").exists()
        (tmp_path / "clean").write_bytes(b"an ordinary line\n" + bytes(4096) + b"A" * 4096)
        assert call("debug", "dump", folder, tmp_path / "dump", "--log", tmp_path / "clean")[0] == 0


def test_it_is_never_written_over_and_only_the_end_of_a_log_is_taken(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        (tmp_path / "log").write_bytes(b"begin" + b"x" * 5 * 1024 * 1024 + b"end")
        assert call("debug", "dump", cluster.folder(0), tmp_path / "d", "--log", tmp_path / "log")[0] == 0
        taken = parts_of(tmp_path / "d")["logs/0-log"]
        assert (len(taken), taken[:1], taken[-3:]) == (4 * 1024 * 1024, b"x", b"end")
        before = (tmp_path / "d").read_bytes()
        code, done = call("debug", "dump", cluster.folder(0), tmp_path / "d")
        assert (code, "not overwritten" in done["error"]["message"]) == (1, True)
        assert (tmp_path / "d").read_bytes() == before
