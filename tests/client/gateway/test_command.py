"""`trustlog-client gateway`: its banner, its refusals, its end."""

import signal
import socket

import pytest

from replica.cluster.provision import init_cluster
from tests.client.test_cli import document, runner
from tests.support.gateway import GatewayProcess


@pytest.fixture
def run(fleet, capfdbinary):
    return runner(fleet.directory, capfdbinary)


def test_the_banner_says_whom_it_must_be_trusted_by_and_it_ends_by_a_signal(fleet):
    """With a dead cluster too: it starts, says that it is not ready, and ends with 0."""
    with GatewayProcess(fleet.directory, 1.0) as gateway:
        assert gateway.banner["schema_version"] == 1
        assert gateway.banner["needed"] == 2
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(20) == 0
        assert gateway.log.read_text() == ""


def test_an_address_that_is_taken(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for option in ("--resp", "--http"):
            code, out, err = run("gateway", option, address)
            assert (code, out) == (2, b"")
            assert b"cannot listen at " + address.encode() in err
            assert b"hint: choose another address" in err
            code, out, _ = run("gateway", option, address, "-o", "json")
            assert (code, document(out)["error"]["code"]) == (2, "address")


def test_other_machines_need_a_password(run, tmp_path):
    for address in ("0.0.0.0:6380", "[::]:6380", "192.0.2.1:6380"):
        for option in ("--resp", "--http"):
            code, _, err = run("gateway", option, address)
            assert code == 2
            assert b"can be reached from other machines" in err
    empty = tmp_path / "empty"
    empty.write_text("\n")
    empty.chmod(0o600)
    code, _, err = run("gateway", "--resp", "0.0.0.0:0", "--password-file", str(empty))
    assert code == 2
    assert b"its first line must have" in err


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "127.0.0.1:70000", ":0", "1.2.3.4:x"])
def test_what_is_no_address_is_a_usage_error(run, address):
    code, _, err = run("gateway", "--resp", address)
    assert code == 2
    assert b"see: trustlog-client gateway --help" in err


def test_another_application_is_refused(tmp_path, capfdbinary):
    init_cluster(tmp_path / "c", base_port=0, application="replica.apps.counter:Counter")
    code, _, err = runner(tmp_path / "c", capfdbinary)("gateway")
    assert code == 2
    assert b"a gateway serves replica.apps.kv:KeyValue only" in err


def test_banner_for_people(fleet):
    with GatewayProcess(fleet.directory, 1.0, "-o", "plain", plain=True) as gateway:
        text = gateway.banner
    assert "checks 2 matching replies itself" in text
    assert "Whoever connects trusts this program" in text
