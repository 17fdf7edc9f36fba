"""What the pages say of the gateway, watching and probes is run: with free ports instead of those of the pages."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from client.gateway.server import TABLE
from tests.documents.test_commands import as_process, commands, environment, python_blocks, run, run_python
from tests.support.cluster import Processes
from tests.support.gateway import GatewayProcess
from tests.support.ports import consecutive_ports
from tests.support.tools import tool
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory in which my-cluster is, which runs."""
    directory = tmp_path_factory.mktemp("pages") / "a b"
    directory.mkdir()
    with Processes(directory / "my-cluster") as cluster:
        cluster.start_and_wait()
        yield directory


def tool_lines(page: str) -> list[str]:
    """The indented lines of a page that call redis-cli or curl."""
    lines = re.findall(r"^    ((?:redis-cli|curl) .*)$", (ROOT / page).read_text(), re.MULTILINE)
    return [line.split(" #")[0].strip() for line in lines]


def run_tool(line: str) -> str:
    words = shlex.split(line)
    options = ["-sS", "--fail"] if words[0] == "curl" else []
    done = subprocess.run(
        [tool(words[0]), *options, *words[1:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize("page", ["README.md", "client/gateway/README.md"])
def test_the_gateways_lines(here, page):
    (line,) = [line for line in commands(page) if " gateway " in line]
    words = as_process(line.replace(":6380", ":0").replace(":8080", ":0"))
    options = words[words.index("gateway") + 1 :]
    assert options == ["--resp", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    lines = tool_lines(page)
    assert {line.split()[0] for line in lines} == {"redis-cli", "curl"}
    with GatewayProcess(here / "my-cluster") as gateway:
        here_ports = [
            one.replace("-p 6380", f"-p {gateway.resp}").replace(":8080", f":{gateway.http}") for one in lines
        ]
        answers = [run_tool(one) for one in here_ports]
    assert not any("ERR" in found for found in answers), answers
    assert all(json.loads(found) for one, found in zip(lines, answers, strict=True) if one.startswith("curl"))


def test_the_gateways_page_names_every_command_and_its_words_are_those_of_the_program():
    page = (ROOT / "client" / "gateway" / "README.md").read_text()
    table = page[page.index("| commands | |") : page.index("Others are answered")]
    first_cells = " ".join(row.split("|")[1] for row in table.splitlines()[2:] if row.startswith("|"))
    assert set(re.findall(r"\b[A-Z]{3,}\b", first_cells)) - {"EXAT", "PXAT"} == {name.upper() for name in TABLE}


def test_watching_as_the_clients_page_says(here):
    lines = [line for line in commands("client/README.md") if " watch " in line]
    assert len(lines) == 2
    assert "--after 1234 --count 10 -o json" in lines[1]
    for line in lines:
        # As the page says it, but ending after one change, and from a slot that there is.
        begin = line.replace("--after 1234", "--after 0").replace("--count 10", "").replace(" -o json", "")
        watch = subprocess.Popen(
            [*as_process(begin), "--count", "1", "-o", "json"],
            cwd=here,
            env=environment(TRUSTLOG_CLUSTER="my-cluster"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with watch:
            assert watch.stderr.readline().startswith("watching from ")
            done = run("trustlog-client -c my-cluster incr user/n", here)
            assert done.returncode == 0, done.stderr
            out, _ = watch.communicate(timeout=60)
        assert watch.returncode == 0
        assert json.loads(out)["key"].startswith("user/")


def test_the_python_of_the_clients_page(here):
    blocks = python_blocks("client/README.md")
    assert len(blocks) == 3
    for block in blocks:
        done = run_python(["-c", block], here)
        assert done.returncode == 0, done.stderr
        assert "b'hello'" in done.stdout or "b'user/1' b'ann'" in done.stdout or "True [" in done.stdout


def test_the_receipts_of_the_clients_page(here, tmp_path):
    lines = [line for line in commands("client/README.md") if "receipt" in line]
    assert [line.split()[1] for line in lines] == ["put", "receipt"]
    for line in lines:
        done = run(line, here, TRUSTLOG_CLUSTER="my-cluster")
        assert done.returncode == 0, (line, done.stderr)
    assert re.fullmatch(
        r'slot \d+: put "greeting" "hello" gave (created|replaced); by client \w{16}, attested by replicas \d \d\n',
        done.stdout,
    )


def test_the_probes_of_the_replicas_page(tmp_path):
    (line,) = [line for line in commands("replica/README.md") if "--http-base-port" in line]
    base = consecutive_ports(3)
    lines = tool_lines("replica/README.md")
    assert len(lines) == 5
    with (tmp_path / "dev.log").open("wb") as log:
        words = as_process(line.replace("8100", str(base)))
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    try:
        ready = [tool("curl"), "-s", "--fail", f"http://127.0.0.1:{base}/readyz"]
        wait_for(
            lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0 or process.poll(),
            "the first replica is ready",
            40,
        )
        for number in range(3):
            for one in lines:
                found = run_tool(one.replace("8100", str(base + number)).replace("/readyz", "/livez"))
                assert "trustlog_executed" in found or json.loads(found)
    finally:
        process.terminate()
        assert process.wait(40) == 0, (tmp_path / "dev.log").read_text()
