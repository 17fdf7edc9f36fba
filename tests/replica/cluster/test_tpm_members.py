"""Replicas whose logs are in TPMs: what is made, written into the public and the cluster file, and refused."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import subprocess
import sys
from contextlib import closing

import pytest

from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home
from replica.cluster.provision import (
    ProvisionError,
    TpmPlace,
    assemble,
    keygen,
    load_public_part,
    make_client,
    public_file_name,
)
from replica.cluster.replicatoml import TrustedLogSettings, load_settings
from replica.cluster.strict_toml import ConfigError
from replica.shell.atrest import CLEAR
from replica.shell.opening import open_trusted_log, payload_seal
from replica.shell.trustedlog import details, protects, trouble
from tests.replica.cluster.support import replace_once
from tests.support.cluster import environment
from tests.support.swtpm import software_tpm
from trustlog import BackendKind, MisuseError
from trustlog.tpm import enrol
from trustlog.tpm.chain import TpmPins, dump_public_file
from trustlog.tpm.folder import CONFIG_FILE, HANDLES, TpmConfig
from trustlog.tpm.opening import open_log
from trustlog.tpm.structures import Public


def accepted(machine, folder, path):
    """Enrol the log in ``folder`` with its TPM, as its verifier; write what was accepted, as `trustlog tpm accept` does."""
    config = TpmConfig.load(folder / CONFIG_FILE)
    with machine.connect() as tpm:
        asked = enrol.request(tpm, config)
        sent = enrol.challenge(asked, [], dt.datetime.now(dt.UTC))
        pins = enrol.accept(asked, sent, enrol.answer(tpm, config, sent.credential))
    path.write_bytes(dump_public_file(Public.parse(asked.key).key, pins))
    return path


@pytest.fixture
def machine(tmp_path):
    with software_tpm(tmp_path / "tpm") as made:
        yield made


@pytest.fixture
def cluster(tmp_path, machine):
    """Replica 1 has a TPM, at PCR 9."""
    folder = tmp_path / "c"
    for number in range(3):
        kind = TrustedLogSettings(BackendKind.TPM if number == 1 else BackendKind.SOFTWARE)
        keygen(folder / f"replica-{number}", number, "127.0.0.1", 7100 + number, kind, TpmPlace(machine.address, 9))
    assemble([folder / f"replica-{n}" / public_file_name(n) for n in range(3)], folder / "cluster.toml")
    return folder


def test_what_was_pinned_is_in_the_public_file_the_cluster_file_and_the_genesis(cluster, machine):
    part = load_public_part(cluster / "replica-1" / public_file_name(1))
    loaded = load_cluster_file(cluster)
    member = loaded.genesis.members[1]
    pins = TpmPins.decode(member.log_pins)
    assert part.member == member
    assert (member.log_kind, pins.pcr, pins.base) == (BackendKind.TPM, 9, bytes(32))
    assert [len(one.log_pins) for one in loaded.genesis.members] == [0, 75, 0]
    home = load_home(cluster / "replica-1")
    log = open_trusted_log(home, None)
    assert (log.kind, trouble(log)) == (BackendKind.TPM, None)
    assert "against a compromised root" in protects(log)
    said = details(log)
    assert (said["pcr"], said["tpm"], said["epoch"]) == (9, machine.address, {"resets": 1, "restarts": 0})
    log.close()


def test_whose_enrolment_was_shown_stands_in_the_cluster_file_outside_the_genesis(cluster, machine, tmp_path):
    files = [cluster / f"replica-{n}" / public_file_name(n) for n in range(3)]
    listed = load_cluster_file(cluster)
    key = listed.genesis.members[1].log_public_key
    assert (listed.enrolled_keys, listed.not_enrolled) == (frozenset(), (1,))
    seen = accepted(machine, cluster / "replica-1" / "log", tmp_path / "accepted.pub")
    shown = assemble(files, tmp_path / "shown.toml", enrolled={1: seen})
    assert shown == load_cluster_file(tmp_path / "shown.toml")
    assert (shown.enrolled_keys, shown.not_enrolled) == (frozenset([key]), ())
    replace_once(tmp_path / "shown.toml", "log_enrolled = true\n", "")
    assert load_cluster_file(tmp_path / "shown.toml").cluster_id == shown.cluster_id
    # What a replica's own file says of itself is refused.
    files[1].write_text(files[1].read_text() + "log_enrolled = true\n")
    with pytest.raises(ConfigError, match="log_enrolled: is not a key"):
        assemble(files, tmp_path / "other.toml")


def test_an_enrolment_of_something_else_is_refused(cluster, machine, tmp_path):
    files = [cluster / f"replica-{n}" / public_file_name(n) for n in range(3)]
    seen = accepted(machine, cluster / "replica-1" / "log", tmp_path / "accepted.pub")
    key, pins = seen.read_text().splitlines()
    other = (cluster / "replica-0" / "log" / "log.pub").read_text().strip()
    for number, content, words in [
        (0, f"{key}\n{pins}\n", "replica 0 keeps no log in a TPM"),
        (3, f"{key}\n{pins}\n", "replica 3 keeps no log in a TPM"),
        (1, f"{other}\n{pins}\n", "the key that was enrolled is another"),
        (1, f"{key}\n{pins[:-2]}01\n", "the pinned value that was enrolled is another"),
        (1, f"{key}\n", "the pinned value that"),
        (1, "nonsense\n", "give the file that trustlog tpm accept wrote"),
    ]:
        (tmp_path / "wrong.pub").write_text(content)
        with pytest.raises(ProvisionError, match=words):
            assemble(files, tmp_path / "no.toml", enrolled={number: tmp_path / "wrong.pub"})
    with pytest.raises(ProvisionError, match="No such file"):
        assemble(files, tmp_path / "no.toml", enrolled={1: tmp_path / "none.pub"})
    assert not (tmp_path / "no.toml").exists()
    path = tmp_path / "shown.toml"
    assemble(files, path, enrolled={1: seen})
    # Nor does the file itself pass it on to a log that is in no TPM.
    replace_once(path, "number = 2\naddress", "number = 2\nlog_enrolled = true\naddress")
    with pytest.raises(ConfigError, match="only a TPM's log can have been enrolled"):
        load_cluster_file(path)


def test_assembling_on_the_command_line_warns_of_what_nobody_was_shown(cluster, machine, tmp_path):
    files = [cluster / f"replica-{n}" / public_file_name(n) for n in range(3)]
    seen = accepted(machine, cluster / "replica-1" / "log", tmp_path / "accepted.pub")
    said = command("assemble", *files, "--out", tmp_path / "a.toml")
    assert "warning: that the log of replica 1 is in a TPM stands in its public file only" in said
    operator = ("--operator", make_client(tmp_path / "operator").public_key.hex())
    shown = command("assemble", *files, "--out", tmp_path / "b.toml", "--enrolled", "1", seen, *operator, "-o", "json")
    assert json.loads(shown)["replicas"][1]["log_enrolled"] is True  # and no warning beside it
    twice = command("assemble", *files, "--enrolled", "1", seen, "--enrolled", "1", seen, code=2)
    assert "names a replica twice" in twice


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("log_pins", "log_pin", "log_pins: is missing"),
        ('log_pins = "09', 'log_pins = "17', "copy them again from the replica's public file"),
        ('log_pins = "09', 'log_pins = "0', "must be 150 hexadecimal digits"),
        ('log_kind = "tpm"', 'log_kind = "process"', "log_pins: is not a key"),
    ],
)
def test_a_cluster_file_with_other_pins_is_refused(cluster, old, new, words):
    replace_once(cluster / "cluster.toml", old, new)
    with pytest.raises(ConfigError, match=words):
        load_cluster_file(cluster)


def test_a_folder_with_other_pins_than_the_cluster_file_is_refused(cluster):
    public = cluster / "replica-1" / "log" / "log.pub"
    key, pins = public.read_text().splitlines()
    public.write_text(f"{key}\n0a{pins[2:]}\n")
    with pytest.raises(ConfigError, match="this pinned value has SHA-256"):
        load_home(cluster / "replica-1")


def test_a_tpm_that_cannot_be_used_makes_no_folder(tmp_path):
    with pytest.raises(ProvisionError, match="no log can be made in a TPM"):
        keygen(
            tmp_path / "r", 0, "127.0.0.1", 7100, TrustedLogSettings(BackendKind.TPM), TpmPlace(str(tmp_path / "none"))
        )
    assert not (tmp_path / "r").exists()


def command(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "replica.cli.main", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_keygen_and_close_on_the_command_line(cluster, machine, tmp_path):
    keygen_command = ["keygen", tmp_path / "r", "--number", "0", "--address", "127.0.0.1:7100"]
    assert "belong to --log-backend tpm" in command(*keygen_command, "--tpm", machine.address, code=2)
    said = command(*keygen_command, "--log-backend", "tpm", "--tpm", machine.address, "--tpm-pcr", "12", "-o", "json")
    assert '"log_backend": "tpm"' in said
    assert not (tmp_path / "r" / "log" / "store.sealed").exists()
    assert "only a log in a TPM ends with a reboot" in command("close", cluster / "replica-0", code=2)
    # Nothing was said yet: a log without an entry has nothing to close.
    assert "there is nothing to close" in command("close", cluster / "replica-1", code=2)


def test_a_sealed_store_is_made_with_its_key_or_not_at_all(machine, tmp_path):
    with machine.connect() as tpm:
        unused = tpm.handles(HANDLES[0])
    trusted = TrustedLogSettings(BackendKind.TPM, encrypt_store=True)
    arguments = ["keygen", tmp_path / "r", "--number", "0", "--address", "127.0.0.1:7100", "--log-backend", "tpm"]
    command(*arguments, "--tpm", machine.address, "--encrypt-store")
    assert load_settings(tmp_path / "r" / "replica.toml").trusted_log == trusted
    with open_log(tmp_path / "r" / "log") as log:
        assert len(log.store_key()) == 32
    with machine.connect() as tpm:
        used = tpm.handles(HANDLES[0])
        assert len(used) == len(unused) + 1
    # The register of the programs holds the first log's: nothing can be sealed to another's.
    with pytest.raises(ProvisionError, match="another program extended it"):
        keygen(tmp_path / "second", 1, "127.0.0.1", 7101, trusted, TpmPlace(machine.address))
    assert not (tmp_path / "second").exists()
    with machine.connect() as tpm:
        assert tpm.handles(HANDLES[0]) == used, "its key was removed again"


def test_a_log_without_a_key_cannot_seal_a_store(cluster):
    home = load_home(cluster / "replica-1")
    trusted = dataclasses.replace(home.settings.trusted_log, encrypt_store=True)
    sealed = dataclasses.replace(home, settings=dataclasses.replace(home.settings, trusted_log=trusted))
    with closing(open_trusted_log(home, None)) as log:
        assert payload_seal(home, log) is CLEAR
        with pytest.raises(MisuseError, match="keeps no key for payloads"):
            payload_seal(sealed, log)
