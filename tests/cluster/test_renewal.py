"""A replica gets another TLS certificate and keeps its log, while clients count up, or while it is away."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys

import pytest

from replica.cluster.home import load_home
from replica.cluster.memberlists import members_path
from replica.cluster.passphrase import PassphraseSource, change_passphrases
from replica.cluster.provision import PublicPart, dump_public_part, load_public_part
from replica.wire.messages import Welcome
from replica.wire.tls import client_context, presented_certificate
from tests.cluster.test_members import DEADLINE_S, Changing, under_load
from tests.support.cluster import environment
from tests.support.waiting import on_loop_for, until
from tests.support.wire import Wire

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


class Renewing(Changing):
    """Keeps what a replica showed before its last renewal."""

    def make_next(self, number=1):
        shutil.copy(self.folder(number) / "tls.crt", self.directory / "old.crt")
        shutil.copy(self.folder(number) / "tls.key", self.directory / "old.key")
        done = self.command("keys", "renew-certificate", self.folder(number), "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["public_file"]

    async def welcomed(self, certificate, key):
        """Say whether replica 0 takes this pair as replica 1's."""
        context = client_context(self.cluster.replicas[0].certificate_der, certificate, key)
        try:
            async with Wire(self, 0, context=context) as wire:
                return isinstance(await wire.replica_hello(1), Welcome)
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError):
            return False

    async def works_with(self, der, total):
        """Check that replica 1 shows this certificate and no other, and that the cluster can count on it."""
        place = self.cluster.replicas[1]
        assert await presented_certificate(place.host, place.port, 5.0) == der
        old = self.directory / "old.crt", self.directory / "old.key"
        assert not await self.welcomed(*old)
        assert await self.welcomed(self.folder(1) / "tls.crt", self.folder(1) / "tls.key")
        assert not (self.folder(1) / "tls.next.crt").exists()
        self.kill(0)
        async with self.client_now() as client:
            assert await client.incr("counter-0") == total + 1
        self.start(0)


def test_a_certificate_is_renewed_under_load(tmp_path):
    with Renewing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        public_file = cluster.make_next()
        der = load_public_part(tmp_path / "c" / "replica-1" / "renewal.public.toml").place.certificate_der

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            assert await cluster.welcomed(cluster.directory / "old.crt", cluster.directory / "old.key")
            renew = ("renew", cluster.directory, public_file, "--reason", "it is old")
            totals = await under_load(cluster, lambda: cluster.member(*renew))
            await cluster.until_all_are_over(1)
            await cluster.works_with(der, totals[0])
            assert cluster.kill(1, signal.SIGTERM) == 0
            cluster.start(1)
            await cluster.until_all_are_over(1)
            await cluster.works_with(der, totals[0] + 1)

        use()
        assert [one["since_list"] for one in cluster.listed()["replicas"]] == [0, 0, 0]


@pytest.mark.long
def test_one_that_was_away_comes_back_with_the_new_certificate(tmp_path):
    """Its peers know only that, and its own list names the old one; its keys have a passphrase."""
    words = tmp_path / "words"
    words.write_text("correct horse\n")
    words.chmod(0o600)
    with Renewing(tmp_path / "c", extra_environment={"TRUSTLOG_PASSPHRASE_FILE": str(words)}) as cluster:
        change_passphrases([cluster.folder(1) / "tls.key"], PassphraseSource(), b"correct horse")
        cluster.start_and_wait()
        missing = cluster.command("keys", "renew-certificate", cluster.folder(1))
        assert (missing.returncode, "no passphrase was given" in missing.stderr) == (2, True)
        done = cluster.command("keys", "renew-certificate", cluster.folder(1), "--passphrase-file", words)
        assert done.returncode == 0, done.stderr
        public_file = cluster.folder(1) / "renewal.public.toml"
        der = load_public_part(public_file).place.certificate_der
        cluster.kill(1)
        cluster.member("renew", cluster.directory, public_file)
        assert not load_home(cluster.folder(1)).is_renewed
        cluster.start(1)

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            await cluster.until_all_are_over(1)
            place = cluster.cluster.replicas[1]
            assert await presented_certificate(place.host, place.port, 5.0) == der
            cluster.kill(0)
            async with cluster.client_now() as client:
                assert await client.incr("n") == 1

        use()


def test_one_whose_peers_were_all_renewed_meanwhile_is_given_the_lists(tmp_path):
    """As the operator's page says: it knows none of them any more."""
    with Renewing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        cluster.kill(1)
        for number in (0, 2):
            cluster.member("renew", cluster.directory, cluster.make_next(number))
        cluster.start(1)
        cluster.wait_logged(1, "wrong peer")
        cluster.kill(1)
        shutil.copy(members_path(cluster.file), cluster.folder(1) / "members.toml")
        cluster.start(1)

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            await cluster.until_all_are_over(2)
            cluster.kill(0)
            async with cluster.client_now() as client:
                assert await client.incr("n") == 1

        use()


def test_killed_as_it_goes_over(tmp_path):
    with Renewing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        public_file = cluster.make_next()
        der = load_public_part(tmp_path / "c" / "replica-1" / "renewal.public.toml").place.certificate_der
        child = subprocess.Popen(
            [sys.executable, "-m", "replica.cli.main", "member", "renew", str(cluster.directory), public_file],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            await until((cluster.folder(1) / "members.toml").exists, "it goes over", 60)
            os.kill(cluster.pid(1), signal.SIGKILL)
            cluster.kill(1)
            cluster.start(1)
            assert await asyncio.to_thread(child.wait, 90) == 0
            await cluster.until_all_are_over(1)
            await cluster.works_with(der, 0)

        try:
            use()
        finally:
            child.kill()
            child.wait(timeout=20)


def test_what_is_refused(tmp_path):
    with Renewing(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        def refused(path, text):
            assert text in cluster.member("renew", cluster.directory, path, expected=2).stderr

        public_file = cluster.folder(1) / "renewal.public.toml"
        cluster.make_next()
        findings = json.loads(cluster.command("doctor", cluster.folder(1), "-o", "json").stdout)["findings"]
        assert [one["severity"] for one in findings if one["subject"].endswith("tls.next.crt")] == ["warning"]
        text = public_file.read_text()
        moved = tmp_path / "moved.toml"
        moved.write_text(text.replace(cluster.cluster.replicas[1].address, "127.0.0.1:9"))
        refused(moved, "replica 1 is at ")
        another = tmp_path / "another.toml"
        another.write_text(text.replace("number = 1\n", "number = 2\n"))
        refused(another, "another log than replica 2's")
        another.write_text(text.replace("number = 1\n", "number = 3\n"))
        refused(another, "there is no replica 3")
        cluster.make(2, "new-2")
        refused(cluster.directory / "new-2" / "replica-2.public.toml", "member replace")
        cluster.moved.clear()
        kept = tmp_path / "kept.toml"
        shutil.copy(public_file, kept)
        cluster.member("renew", cluster.directory, public_file)
        again = cluster.member("renew", cluster.directory, kept)
        assert "nothing is changed: replica 1 has the certificate of" in again.stderr

        @on_loop_for(DEADLINE_S)
        async def over():
            await cluster.until_all_are_over(1)

        over()
        cluster.make_next()
        cluster.member("renew", cluster.directory, public_file)
        refused(kept, "had this certificate before")
        first = PublicPart(cluster.cluster.replicas[1], cluster.cluster.genesis.members[1])
        kept.write_bytes(dump_public_part(first))
        refused(kept, "had this certificate before")
