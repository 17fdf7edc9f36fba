"""The page in a real browser: load, run, step, break, export; and not one error in its console.

TRUSTLOG_SCREENSHOTS names a folder in which pictures are kept.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree as ET

import pytest

from replica.cluster.provision import init_cluster
from replica.lab.scenarios import SCENARIOS
from replica.lab.trace import read_json_lines
from tests.lab.support import served
from tests.support.tools import tool
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def browser():
    path = tool("chromium")
    try:
        library = importlib.import_module("playwright.sync_api")
    except ImportError:
        if os.environ.get("REQUIRE_TOOLS"):
            raise
        pytest.skip("playwright is not installed")
    with library.sync_playwright() as play:
        # The sandbox needs user namespaces, which containers often lack; what is loaded is our own page.
        started = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def url():
    with served() as where:
        yield where


@pytest.fixture
def look(browser, url, tmp_path, request):
    """Open an address of the page; at the end, nothing may have gone wrong in it."""
    pages, troubles = [], []

    def open_page(query: str, wait: str = ".panel", at: str = url, **context: object):
        page = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context)).new_page()
        page.on("console", lambda said: troubles.append(said.text) if said.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("requestfailed", lambda failed: troubles.append(failed.url))
        page.on("request", lambda asked: None if asked.url.startswith((at, "blob:")) else troubles.append(asked.url))
        page.goto(at + query)
        page.wait_for_selector(wait)
        pages.append(page)
        return page

    yield open_page
    folder = Path(os.environ.get("TRUSTLOG_SCREENSHOTS", tmp_path))
    for place, page in enumerate(pages):
        page.screenshot(path=folder / f"{request.node.name}-{place}.png")
        page.context.close()
    assert [trouble for trouble in troubles if "status of 400" not in trouble] == []


def holds(page, condition: str) -> None:
    """Wait until something holds in the page."""
    wait_for(lambda: page.evaluate(condition), condition)


def visible_elements(page) -> int:
    return page.evaluate("document.querySelectorAll('.scroll svg > g > g:not(.future)').length")


def test_a_run_steps_forward_and_back(look) -> None:
    page = look("?scenario=equivocation-three-phase")
    assert page.locator("#scenario").input_value() == "equivocation-three-phase"
    before = visible_elements(page)
    for _ in range(6):
        page.click("#forward")
    after = visible_elements(page)
    assert after > before
    assert "step=6" in page.url
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    assert visible_elements(page) == before
    page.keyboard.press("End")
    assert "Verdict: as expected" in page.locator(".said").inner_text()
    assert page.locator(".chip").inner_text() == "✓ safe, ✓ live"
    page.keyboard.press("Home")
    page.keyboard.press("d")
    assert "this step decides it" in page.locator(".said").inner_text()
    assert "proposed-twice" in page.locator(".said").inner_text()


def test_the_address_brings_back_a_run_at_its_step(look) -> None:
    page = look("?scenario=outcome-only&seed=5&step=4&speed=2")
    said = page.locator(".said").inner_text()
    again = look(page.url.partition("/?")[2].join(["?", ""]))
    assert again.locator(".said").inner_text() == said
    assert again.locator("#seed").input_value() == "5"
    assert again.locator("#speed").input_value() == "2"


def test_it_plays_and_pauses(look) -> None:
    page = look("?scenario=log-ahead&speed=8")
    page.keyboard.press(" ")
    holds(page, "Number(document.querySelector('#slider').value) >= 3")
    page.keyboard.press(" ")
    assert page.locator("#play").inner_text() == "Play"
    page.select_option("#grain", "all")
    assert int(page.locator("#slider").get_attribute("max")) > 20


def test_two_systems_under_the_same_attack(look) -> None:
    page = look("?scenario=unordered&beside=hidden-vote-three-phase", viewport={"width": 1600, "height": 1000})
    assert page.locator(".panel").count() == 2
    page.keyboard.press("End")
    assert page.locator(".chip").all_inner_texts() == ["✖ safety broken", "✓ safe, ✓ live"]


def test_a_click_on_a_message_shows_its_attestation(look) -> None:
    page = look("?scenario=equivocation-three-phase&step=9999")
    page.locator("g.arrow:not(.future) .message:not(.dim)").first.dispatch_event("click")
    details = page.locator(".details").inner_text()
    assert "Attestation" in details
    assert "✓ yes: these entries" in details
    assert "head after" in details
    page.goto(page.url.replace("equivocation-three-phase", "outcome-only"))
    page.wait_for_selector(".panel")
    page.locator("g.arrow:not(.future) .message:not(.dim)").first.dispatch_event("click")
    assert "attested by no log" in page.locator(".details").inner_text()


def test_quorums_are_drawn(look) -> None:
    page = look("?scenario=quorums-logs&step=9999")
    assert page.locator(".quorums th").inner_text() == "in both"
    assert "One replica in common is enough" in page.locator(".quorums").inner_text()
    assert page.locator(".meters .met").count() > 0


def test_what_is_exported_is_whole(look) -> None:
    page = look("?scenario=cloned-log&step=9999")
    found = {}
    for kind in ("svg", "jsonl", "shiviz"):
        with page.expect_download() as download:
            page.click(f"[data-export={kind}]")
        found[kind] = Path(download.value.path()).read_text()
    svg = ET.fromstring(found["svg"])  # noqa: S314 - our own
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in found["svg"]
    assert "replica 2" in found["svg"]
    assert read_json_lines(found["jsonl"]).verdict["safe"] is False
    assert found["shiviz"].startswith(("A {", "B {", "r0 {"))


def test_a_visitor_breaks_what_can_be_broken(look) -> None:
    page = look("?mode=break")
    page.select_option("#play-beside", "cloned")
    holds(page, "document.querySelectorAll('.panel').length === 2")
    page.get_by_role("button", name="Say one thing to some").click()
    holds(page, "document.querySelectorAll('.moves li').length === 4")
    holds(page, "document.querySelector('.result').innerText.includes('you broke safety')")
    safe, broken = page.locator(".result li").all_inner_texts()
    assert "nothing was broken" in safe
    assert "in slot 5 replica 1 executed A2, and replica 2 executed B2" in broken
    # By hand: one more move, and the address holds them all.
    page.select_option("#move-kind", "SUSPECT")
    page.get_by_role("button", name="Append", exact=True).click()
    holds(page, "document.querySelectorAll('.moves li').length === 5")
    holds(page, "new URLSearchParams(location.search).get('moves').includes('SUSPECT')")
    again = look("?" + page.url.partition("/?")[2])
    holds(again, "document.querySelectorAll('.panel').length === 2")
    assert again.locator(".moves li").count() == 5


def test_it_fits_a_phone_and_the_dark(look) -> None:
    page = look("?scenario=cloned-log", viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    # Turned, or dragged to a projector: the drawing fills what there is.
    page.set_viewport_size({"width": 1900, "height": 800})
    holds(page, "document.querySelector('.scroll svg').getBoundingClientRect().width > 1700")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_a_name_that_is_no_scenarios_is_passed_over(look) -> None:
    page = look("?scenario=nothing")
    assert page.locator("#scenario").input_value() == next(iter(SCENARIOS))


@pytest.mark.parametrize(
    "query",
    [
        "?scenario=unordered&seed=abc&step=-5&speed=99&grain=zzz&mode=nonsense&beside=nothing",
        "?scenario=unordered&seed=1.5&step=1e9",
        "?scenario=unordered&seed=-1&mode=live",
        "?seed=99999999999999999999&step=NaN",
        "?scenario=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&seed=%3Cb%3E&beside=%3Cb%3E",
    ],
)
def test_an_address_that_was_typed_or_cut_off_shows_a_run(look, query) -> None:
    page = look(query)
    assert page.locator("#problem").is_hidden()
    assert page.locator("#speed").input_value() == "1"
    assert page.locator("#grain").input_value() == "story"
    assert page.locator("#seed").input_value() in {"0", "1", "1000000"}
    page.keyboard.press("End")
    assert "Verdict: as expected" in page.locator(".said").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "Verdict" not in page.locator(".said").inner_text()


@pytest.mark.parametrize(
    "moves",
    [
        "{",
        "[]]",
        "null",
        "5",
        '{"moves":5}',
        '{"moves":[null]}',
        '{"moves":[{"show":7}]}',
        '{"system":"x"}',
        '{"replica":7}',
    ],
)
def test_an_address_with_a_play_that_is_none_is_said_and_leaves_an_empty_one(look, moves) -> None:
    page = look("?mode=break&moves=" + quote(moves))
    if moves not in {"null", "5"}:  # these name nothing
        assert "cannot be read" in page.locator("#problem").inner_text()
    assert page.locator(".moves li").count() == 0
    page.get_by_role("button", name="Say one thing to some").click()
    holds(page, "document.querySelectorAll('.moves li').length === 4")
    holds(page, "document.querySelector('#problem').hidden")


def test_a_phone_has_more_room_for_the_drawing_than_for_buttons(look) -> None:
    page = look("?scenario=quorums-logs&step=9999", viewport={"width": 360, "height": 740})
    taken = "['header', '#controls'].reduce((sum, at) => sum + document.querySelector(at).getBoundingClientRect().height, 0)"
    assert page.evaluate(taken) < 740 / 4
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_every_control_is_reached_by_the_keyboard(look) -> None:
    page = look("?scenario=log-ahead")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.dataset.mode || document.activeElement.tagName"
            )
        )
    assert {"watch", "break", "help-button", "theme", "scenario", "beside", "seed", "play", "slider", "grain"} <= set(
        reached
    )


def test_a_live_cluster_is_shown_and_has_no_button(look, tmp_path) -> None:
    init_cluster(tmp_path / "c", f=1, base_port=0)
    with served("--attach", str(tmp_path / "c")) as where:
        page = look("", wait="#live table", at=where)
        assert "Cluster c: n = 3, f = 1" in page.locator("#live").inner_text()
        assert page.locator("#live button, #live input, #live a").count() == 0
        # It asks no more once it is hidden; what it asked last must be answered before the server ends.
        page.click("[data-mode=watch]")
        page.wait_for_selector(".panel")
        page.wait_for_load_state("networkidle")


def test_what_the_server_refuses_is_said(look) -> None:
    page = look("?mode=break&moves=%7B%22moves%22%3A%5B%7B%22do%22%3A%22lie%22%7D%5D%7D", wait="#problem:not([hidden])")
    assert "move 1: do must be" in page.locator("#problem").inner_text()
