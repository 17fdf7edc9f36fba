"""What the lab's server answers, and that its page needs nothing from elsewhere."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from importlib.resources import files

import pytest

from replica.lab import serve
from replica.lab.scenarios import SCENARIOS
from replica.lab.systems import SYSTEMS
from replica.lab.trace import read_json_lines
from tests.lab.support import served


@pytest.fixture(scope="module")
def url():
    with served() as where:
        yield where


def get(url: str, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(url + path, headers=headers)  # noqa: S310 - ours
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - ours
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def test_scenarios_and_systems_are_listed(url: str) -> None:
    found = json.loads(get(url, "api/scenarios")[1])
    assert [s["name"] for s in found["scenarios"]] == list(SCENARIOS)
    assert [s["name"] for s in found["systems"]] == list(SYSTEMS)
    assert found["live"] is False


@pytest.mark.parametrize("name", ["pbft-equivocation", "outcome-only-3f1"])
def test_a_trace_is_the_one_that_the_command_writes(url: str, name: str) -> None:
    status, text, headers = get(url, f"api/trace/{name}?seed=3")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/x-ndjson")
    assert read_json_lines(text).lines == SCENARIOS[name].run(3).lines
    assert get(url, f"api/shiviz/{name}?seed=3")[0] == 200


def test_a_play_is_run_and_a_bad_one_refused(url: str) -> None:
    good = urllib.parse.urlencode({"system": "three-phase", "replica": 0, "moves": '[{"do":"behave"}]'})
    assert read_json_lines(get(url, f"api/play?{good}")[1]).verdict["safe"]
    assert get(url, f"api/play/shiviz?{good}")[0] == 200
    bad = urllib.parse.urlencode({"system": "three-phase", "replica": 0, "moves": '[{"do":"lie"}]'})
    status, text, _ = get(url, f"api/play?{bad}")
    assert status == 400
    assert "move 1: do must be" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("api/trace/nothing", 404, "lab list"),
        ("api/trace/unordered?seed=-1", 400, "seed"),
        ("api/trace/unordered?seed=1000001", 400, "seed"),
        ("api/trace/unordered?seed=%D9%A1", 400, "seed"),  # a digit, but not ASCII
        ("api/play?system=x&replica=0", 404, "system"),
        ("api/play?system=outcome&replica=2", 400, "replica 0 or 1"),
        ("api/live", 404, "no cluster is attached"),
        ("static/serve.py", 404, "no part"),
        ("static/..%2fserve.py", 404, ""),
    ],
)
def test_what_is_not_there_is_said(url: str, path: str, status: int, word: str) -> None:
    code, text, _ = get(url, path)
    assert code == status
    assert word in json.loads(text)["error"]["message"]


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    for path in ("", *(f"static/{part}" for part in serve.PARTS)):
        status, _, headers = get(url, path)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert not re.search(r"https?:|\*|unsafe-eval", policy)


def test_the_pages_parts_are_those_in_the_package_and_name_no_other_place() -> None:
    page = files("replica.lab").joinpath("page")
    assert {part.name for part in page.iterdir()} == {*serve.PARTS, "index.html"}
    for part in page.iterdir():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", part.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}


def test_a_page_of_another_place_cannot_ask(url: str) -> None:
    """A name that leads to this machine is no name of this server (DNS rebinding)."""
    assert get(url, "api/scenarios", Host="example.com")[0] in {400, 403, 421}


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_makes_this_machine_run_nothing(url: str, site: str) -> None:
    play = urllib.parse.urlencode({"system": "three-phase", "replica": 0, "moves": '[{"do":"behave"}]'})
    for path in (
        "api/trace/unordered",
        "api/shiviz/unordered",
        f"api/play?{play}",
        f"api/play/shiviz?{play}",
        "api/live",
    ):
        status, text, _ = get(url, path, **{"Sec-Fetch-Site": site})
        assert (status, json.loads(text)["error"]["code"]) == (403, "other-site")
    for mine in ("same-origin", "none"):
        assert get(url, "api/trace/unordered", **{"Sec-Fetch-Site": mine})[0] == 200
    # A link from elsewhere leads to the page.
    assert get(url, "?scenario=unordered", **{"Sec-Fetch-Site": site})[0] == 200


@pytest.mark.parametrize(
    "moves",
    [
        "{", "[", "[" * 5000, "9" * 5000, "null", '"x"', "[1]", "[null]", '[{"do":["append"]}]', '[{"do":"append","kind":["x"]}]',
        '[{"do":"append","kind":{}}]', '[{"do":"append","kind":"PREPARE","view":0,"slot":1,"batch":["A"]}]',
        '[{"do":"append","kind":"CHECKPOINT","slot":1e999}]', '[{"do":"append","kind":"CHECKPOINT","slot":NaN}]',
        '[{"do":"append","kind":"CHECKPOINT","slot":true}]', '[{"do":"show","show":[true]}]', '[{"do":"show","show":[[1]]}]',
        '[{"do":"show","show":{"1":1}}]', '[{"do":"wait","ms":-1}]', "[" + ",".join(['{"do":"behave"}'] * 41) + "]", "x" * 7000,
    ],
)  # fmt: skip
def test_moves_that_are_none_are_refused_with_a_reason(url: str, moves: str) -> None:
    query = urllib.parse.urlencode({"system": "three-phase", "replica": 0, "moves": moves})
    status, text, _ = get(url, f"api/play?{query}")
    assert (status, json.loads(text)["error"]["code"]) == (400, "bad-request")


def test_bodies_and_methods_that_nobody_wants_are_refused(url: str) -> None:
    for body, wanted in ((b"{}", 405), (bytes(3_000_000), 413)):
        request = urllib.request.Request(url + "api/play", data=body, method="POST")  # noqa: S310 - ours
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)  # noqa: S310 - ours
        with refused.value as error:
            assert error.code == wanted


def test_what_nobody_expected_is_reported_where_the_server_runs(capsys) -> None:
    serve._report(RuntimeError("a run that failed"))
    said = capsys.readouterr()
    assert (said.out, "RuntimeError: a run that failed" in said.err) == ("", True)


def test_runs_are_kept_but_not_for_ever() -> None:
    import asyncio

    async def ask() -> int:
        runs, made = serve.Runs(), []
        for key in [*range(serve.TRACES_KEPT + 1), serve.TRACES_KEPT, 0]:
            await runs.get(key, lambda k=key: made.append(k))
        return len(made)

    assert asyncio.run(ask()) == serve.TRACES_KEPT + 2
