"""Five replicas with addresses of their own, and links that are cut: `make test-net`. Not part of `make test`: it needs root.

Each replica, and the clients, has a network namespace; a bridge in another one connects them; nftables drops what arrives from
whom. All of it is inside namespaces of the test's own, so the machine's network is not touched and nothing is left.
"""

import json
import subprocess
import sys

import pytest

from replica.cluster.provision import init_cluster
from tests.support.cluster import environment, replica_command
from tests.support.counting import PROGRAM, READ, Counting
from tests.support.spaces import Spaces
from tests.support.tools import tool
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(900)
REPLICAS = tuple(range(5))
CLIENTS = 100  # the last number of the clients' address
PORT = 7100
AGREE_S = 120
GATEWAY = "127.0.0.1:6380"


def address(number: int) -> str:
    """RFC 5737's network for examples: whatever this machine is connected to, it is not that."""
    return f"192.0.2.{number + 10 if number in REPLICAS else number}"


class Net:
    """The namespaces, the bridge, and the programs in them."""

    def __init__(self, spaces: Spaces, directory) -> None:
        self.spaces, self.directory = spaces, directory
        self._started: list[subprocess.Popen] = []

    def build(self) -> None:
        run = self.spaces.run
        run("ip", "link", "add", "name", "bridge", "type", "bridge")
        run("ip", "link", "set", "bridge", "up")
        for number in (*REPLICAS, CLIENTS):
            name, link = f"n{number}", f"veth{number}"
            run("ip", "netns", "add", name)
            run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", link, "master", "bridge", "up")
            run("ip", "-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            rules = "add table ip cut; add chain ip cut input { type filter hook input priority 0; }"
            self.at(number, "nft", rules)

    def at(self, number: int, *command: str, **options) -> subprocess.CompletedProcess:
        return self.spaces.run("ip", "netns", "exec", f"n{number}", *command, **options)

    def command_at(self, number: int, *command: str) -> list[str]:
        return self.spaces.inside("ip", "netns", "exec", f"n{number}", *command)

    def start(self, name: str, number: int, *command: str) -> None:
        with (self.directory.parent / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                self.command_at(number, *command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )
        self._started.append(started)

    def cut(self, speakers, listeners) -> None:
        """Have the listeners receive nothing from the speakers any more; the other way stays as it is."""
        for listener in listeners:
            for speaker in speakers:
                self.at(listener, "nft", f"add rule ip cut input ip saddr {address(speaker)} drop")

    def split(self, *groups) -> None:
        """Cut all links between the groups, both ways."""
        for one in groups:
            for other in groups:
                if one is not other:
                    self.cut(one, other)

    def heal(self) -> None:
        for number in (*REPLICAS, CLIENTS):
            self.at(number, "nft", "flush chain ip cut input")

    def client(self, *arguments: str, check=True) -> subprocess.CompletedProcess:
        program = (sys.executable, "-m", "client.cli.main", "-c", str(self.directory))
        return self.at(CLIENTS, *program, *arguments, check=check, env=environment())

    def reports(self) -> dict[int, dict]:
        done = self.client("status", "-o", "json", check=False)
        found = json.loads(done.stdout)["replicas"] if done.stdout else []
        return {one["number"]: one["report"] for one in found if one["reachable"]}

    def wait_agreed(self) -> dict[int, dict]:
        """Wait until all executed the same, in one view, and are connected with all."""

        def agreed():
            reports = self.reports()
            if len(reports) < len(REPLICAS) or len({(one["executed"], one["view"]) for one in reports.values()}) > 1:
                return None
            return all(peer["connected"] for one in reports.values() for peer in one["peers"]) and reports

        return wait_for(agreed, "all replicas agree", AGREE_S)

    def primary(self) -> int:
        """Return the primary of the highest view that is known."""
        return max(self.reports().values(), key=lambda report: report["view"])["primary"]

    def read(self, keys: list[str]) -> list[str]:
        done = self.at(CLIENTS, sys.executable, "-c", READ, str(self.directory), *keys, env=environment(), seconds=200)
        return json.loads(done.stdout)

    def load(self) -> Counting:
        host, port = GATEWAY.split(":")
        command = self.command_at(CLIENTS, sys.executable, str(PROGRAM), host, port, "-", "4", "")
        return Counting(command, environment())


@pytest.fixture
def net(tmp_path):
    tool("nft")
    # What `ip netns` keeps in /run is in this mount namespace only.
    first = "mkdir -p /run/netns && mount -t tmpfs none /run/netns && echo ready && exec sleep infinity"
    hosts = tuple(address(number) for number in REPLICAS)
    directory = tmp_path / "cluster"
    init_cluster(directory, f=2, hosts=hosts, base_port=PORT)
    with Spaces(first, tmp_path / "first.log") as spaces:
        wait_for(lambda: "ready" in spaces.log.read_text() or spaces.has_ended, "the first process is ready", 20)
        net = Net(spaces, directory)
        net.build()
        try:
            for number in REPLICAS:
                net.start(f"replica-{number}", number, *replica_command(directory / f"replica-{number}"))
            net.wait_agreed()
            gateway = ("-m", "client.cli.main", "-c", str(directory), "gateway", "--resp", GATEWAY)
            net.start("gateway", CLIENTS, sys.executable, *gateway)
            wait_for(
                lambda: "Redis protocol at" in (tmp_path / "gateway.log").read_text(), "the gateway listens", AGREE_S
            )
            yield net
        except BaseException:
            for log in sorted(tmp_path.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise
        finally:
            spaces.stop()
            for started in net._started:
                started.wait(20)


def test_links_that_are_cut_and_healed(net):
    """Under load: one way, both ways, around the primary, into halves without a majority; and healed each time."""
    everybody = set(REPLICAS)
    with net.load() as load:
        load.more(100)

        # One way: the primary is heard by nobody, and hears all.
        deaf = net.primary()
        net.cut([deaf], everybody - {deaf})
        load.more(100)
        assert net.primary() != deaf
        net.heal()
        net.wait_agreed()

        # One way: two backups hear nobody.
        primary = net.primary()
        backups = sorted(everybody - {primary})
        net.cut(everybody - set(backups[:2]), backups[:2])
        load.more(100)
        net.heal()
        net.wait_agreed()

        # Both ways: the primary and one more here, three there.
        primary = net.primary()
        backups = sorted(everybody - {primary})
        net.split([primary, backups[0]], backups[1:])
        load.more(100)
        assert net.primary() in backups[1:]
        net.heal()
        net.wait_agreed()

        # Two, two and one: no quorum anywhere, so nothing is answered; all of it is carried out when it is healed.
        net.split([0, 1], [2, 3], [4])
        refused = net.client("--deadline", "3", "put", "nowhere", "x", check=False)
        assert refused.returncode == 3, refused.stderr
        acknowledged = load.acknowledged
        refused = net.client("--deadline", "3", "get", "counter-0", check=False)
        assert (refused.returncode, load.acknowledged) == (3, acknowledged)
        net.heal()
        load.more(100, seconds=AGREE_S)
    reports = net.wait_agreed()
    for report in reports.values():
        assert all(one["verdict"] == "trusted" for one in report["verdicts"]), report["verdicts"]
    load.check(net.read)
    # Each of them has it: any two may be away.
    for away in ([0, 1], [2, 3]):
        net.split(away, everybody - set(away) | {CLIENTS})
        load.check(net.read)
        net.heal()
        net.wait_agreed()
