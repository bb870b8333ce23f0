"""The web console over a real mesh, in a real Chromium: what it shows and does."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="playwright is not installed, which drives the browser")

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect

from tests.support.browser import chromium
from tests.support.commands import tokenloom
from tests.support.mesh import Mesh
from tests.support.uneven_mesh import EVIL, ended
from tests.support.waiting import wait_until

SOON_MS = 8_000


@pytest.fixture(scope="module")
def evil_key(uneven_mesh: Mesh) -> str:
    """A key of a tenant with a bad name, which has asked for something."""
    made = tokenloom(uneven_mesh, "keys", "create", "--name", "evil", "--tenant", EVIL, "--json")
    key = str(json.loads(made.stdout)["key"])
    body = {"model": EVIL, "prompt": EVIL, "max_tokens": 4}

    def status() -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{uneven_mesh.edge}/v1/completions", json=body, headers=headers, timeout=5).status_code

    wait_until(lambda: status() == 200, within=5)
    wait_until(lambda: bool(ended(uneven_mesh, tenant=EVIL)), within=5)
    return key


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser, uneven_mesh: Mesh) -> Iterator[Page]:
    """The console, before a key is entered. Whatever a browser complains of fails the test."""
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # Browsers write down what is refused or is not there yet, too.
        if message.type in ("error", "warning") and not re.search(r"status of 40[134]", message.text):
            complaints.append(message.text)

    with browser.new_context(base_url=uneven_mesh.edge, viewport={"width": 1280, "height": 800}) as context:
        opened = context.new_page()
        opened.set_default_timeout(SOON_MS)
        opened.on("console", note)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto("/")
        yield opened
        assert "owned" not in opened.title()
    assert complaints == []


def enter(page: Page, key: str) -> None:
    page.get_by_placeholder("tl-…").fill(key)
    page.get_by_role("button", name="Use it").click()


def test_the_fleet_is_live_without_polling_and_says_who_is_slow_and_why(page: Page, uneven_mesh: Mesh) -> None:
    enter(page, "tl-nope")
    expect(page.locator("#key-notice")).to_have_text("This key is not known.")
    enter(page, uneven_mesh.key)
    expect(page.locator("#workers tbody tr")).to_have_count(4)
    expect(page.locator("#link")).to_have_text("live")
    expect(page.locator("#troubles li")).to_contain_text("slow-0 is slow: a decode step takes")
    expect(page.locator("#workers tr", has_text="slow-0")).to_contain_text("slow")
    expect(page.locator("#workers tr", has_text="evil-0")).to_contain_text(EVIL)
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    page.on("request", note)
    assert tokenloom(uneven_mesh, "workers", "cordon", "quick-1").returncode == 0
    expect(page.locator("#workers tr", has_text="quick-1")).to_contain_text("cordoned")
    assert tokenloom(uneven_mesh, "workers", "undrain", "quick-1").returncode == 0
    expect(page.locator("#workers tr", has_text="quick-1")).to_contain_text("ready")
    assert asked == []
    assert page.evaluate("Object.keys(localStorage)") == []
    assert page.evaluate("sessionStorage.getItem('tokenloom.key')") == uneven_mesh.key


def test_a_chat_streams_and_leads_to_where_its_time_went(page: Page, uneven_mesh: Mesh) -> None:
    enter(page, uneven_mesh.key)
    expect(page.locator("#link")).to_have_text("live")
    page.keyboard.press("2")
    page.locator("#model").select_option("sim")
    page.locator("#max-tokens").fill("30")
    page.locator("#prompt").fill("hello")
    page.keyboard.press("Enter")
    answer = page.locator(".said.assistant")
    expect(answer.locator("small")).to_contain_text("30 tokens")
    assert answer.locator("pre").inner_text().strip()
    page.get_by_role("link", name="where its time went").click()
    expect(page.locator("#story .legend")).to_contain_text("Decode")
    expect(page.locator("#story .legend")).to_contain_text("30 tokens, one every")
    expect(page.locator("#story tr.chosen")).to_have_count(1)
    slow = ended(uneven_mesh, worker="slow-0")[0]["request_id"]
    page.locator("#request-id").fill(slow)
    page.locator("#request-id").press("Enter")
    expect(page.locator("#story")).to_contain_text("slow-0 is slow at present: a decode step takes")


def test_what_models_and_tenants_say_is_text_and_never_markup(page: Page, uneven_mesh: Mesh, evil_key: str) -> None:
    del evil_key

    def say(route: Route) -> None:
        chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": EVIL}, "finish_reason": "stop"}]}
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    enter(page, uneven_mesh.key)
    expect(page.locator("#link")).to_have_text("live")
    page.route("**/v1/chat/completions", say)
    page.keyboard.press("2")
    page.locator("#prompt").fill(EVIL)
    page.keyboard.press("Enter")
    expect(page.locator(".said pre")).to_have_text([EVIL, EVIL])
    page.locator("#main").focus()
    page.keyboard.press("3")
    expect(page.locator("#latest tr", has_text="evil-0").first).to_contain_text(EVIL)
    page.keyboard.press("4")
    expect(page.locator("#report")).to_contain_text(EVIL)
    expect(page.locator("#by-tenants")).to_contain_text(EVIL)
    assert page.locator("main img").count() == 0


def test_a_key_without_the_admin_right_may_chat_and_is_told_what_it_may_not(
    page: Page, uneven_mesh: Mesh, evil_key: str
) -> None:
    del uneven_mesh
    enter(page, evil_key)
    expect(page.locator("#fleet-notice")).to_have_text("The fleet is shown to admin keys.")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") in ("dark", "light")
    page.keyboard.press("4")
    expect(page.locator("#usage-notice")).to_have_text("Usage is shown to admin keys.")
    page.keyboard.press("2")
    expect(page.locator("#model option")).to_have_count(2)
