"""The page in a real browser: what a person does there, at a desk, in the dark, on a phone, without
a script and with a screen reader.

Pictures of each page are made on the way; with RELAY_PICTURES=1 they become those of the
documentation (docs/pictures).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from relay.queue.entry import State
from relay.queue.store import QueueFilter
from tests.fakes.page import LATER, PASSWORD, SENT_IN_CLEAR, PageRig, evil_mail, page_rig
from tests.fakes.waiting import patient

pytestmark = pytest.mark.needs("chromium")

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
PATIENCE_MS = 20_000

PAGES = {
    "overview": "/",
    "log": "/log",
    "message": "/message/{id}",
    "queue": "/queue",
    "messages": "/queue?domain=busy.example",
    "destination": "/destination/partner.example",
    "policy": "/policy?from=alice@legal.example&to=bob@partner.example",
    "report": "/report?sender=legal.example",
    "health": "/health",
    "help": "/help",
}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1180, "height": 820}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1180, "height": 820}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}


class Desk:
    """A browser at the page. `complaints`: what it says of policies and scripts."""

    def __init__(self, rig: PageRig, browser: Browser) -> None:
        self.rig = rig
        self._browser = browser
        self.complaints: list[str] = []

    async def open(self, name: str = "olga", **options: Any) -> Page:
        """A window of somebody who has signed in."""
        context: BrowserContext = await self._browser.new_context(
            locale="en-GB", timezone_id="Europe/Zurich", **options
        )
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))
        page.on("console", self._note)
        page.on("request", self._watch)
        await page.goto(f"{self.rig.base}/")
        await page.fill("[name=name]", name)
        await page.fill("[name=password]", PASSWORD)
        await page.click("button")
        await page.wait_for_selector("h1:has-text('Overview')")
        return page

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _watch(self, request: Any) -> None:
        if not request.url.startswith((self.rig.base, "data:")):
            self.complaints.append(f"asks another host: {request.url}")


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with _desk(tmp_path) as made:
        yield made


@asynccontextmanager
async def _desk(directory: Path) -> AsyncIterator[Desk]:
    async with page_rig(directory) as rig, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        made = Desk(rig, browser)
        yield made
        await browser.close()
        assert made.complaints == []


async def test_log_follows_filters_without_reload_and_opens_a_row(desk: Desk) -> None:
    await desk.rig.some_mail()
    page = await desk.open("vera")
    await page.goto(f"{desk.rig.base}/log")
    await expect(page.locator("#follow")).to_contain_text("Following", timeout=PATIENCE_MS)
    await page.wait_for_timeout(700)  # the stream is open, and the reader has seen what was there
    await desk.rig.mail("fresh@partner.example", subject="as it happens")
    await expect(page.locator(".row").first).to_contain_text(
        "fresh@partner.example", timeout=PATIENCE_MS
    )
    await page.evaluate("window.stillHere = true")
    await page.fill("#filters [name=q]", "carol")
    await expect(page.locator(".row")).to_have_count(2, timeout=PATIENCE_MS)
    assert "q=carol" in page.url
    assert await page.evaluate("window.stillHere") is True
    await page.locator(".row summary").first.click()
    await expect(page.locator(".row[open]")).to_contain_text("STARTTLS not offered")
    zone = await page.locator(".row time").first.text_content()
    assert zone == "2026-11-20 13:28:02"  # Zurich's
    await page.locator(".row[open] a").click()
    await expect(page.locator("h1")).to_have_text("Quarterly figures")


async def test_row_of_a_new_event_that_the_filter_leaves_out_does_not_appear(desk: Desk) -> None:
    page = await desk.open("vera")
    await page.goto(f"{desk.rig.base}/log?protection=clear")
    await page.wait_for_timeout(700)
    await desk.rig.mail("verified@partner.example")
    await desk.rig.mail("clear@old.example", SENT_IN_CLEAR)
    await expect(page.locator(".row")).to_have_count(1, timeout=PATIENCE_MS)
    await expect(page.locator(".row")).to_contain_text("clear@old.example")


async def test_operator_holds_marked_messages_after_a_question(desk: Desk) -> None:
    for number in range(3):
        await desk.rig.mail(f"x{number}@busy.example", LATER)
    page = await desk.open("olga")
    await page.click("nav >> text=Queue")
    await page.click("text=busy.example")
    await page.locator("tbody input[type=checkbox]").nth(0).check()
    await page.locator("tbody input[type=checkbox]").nth(2).check()
    await page.click("button:text-is('Hold')")
    await expect(page.locator("h1")).to_have_text("Hold 2 messages?")
    assert (await desk.rig.store.counts())[State.HELD] == 0
    await page.click("main button")
    await expect(page.locator("main")).to_contain_text("2 recipients changed")
    assert (await desk.rig.store.counts())[State.HELD] == 2
    await page.goto(f"{desk.rig.base}/queue?domain=busy.example")
    await page.click("button:text-is('Release all')")
    await page.click("main button")
    await expect(page.locator("main")).to_contain_text("2 recipients changed")


async def test_everything_works_without_a_script(desk: Desk) -> None:
    await desk.rig.some_mail()
    page = await desk.open("olga", java_script_enabled=False)
    await page.goto(f"{desk.rig.base}/log")
    await page.fill("#filters [name=q]", "erin")
    await page.click("button:text-is('Filter')")
    assert await page.locator(".row").count() == 2
    assert "UTC" in (await page.locator(".row time").first.text_content() or "")
    await page.locator(".row summary").first.click()
    await page.click(".row[open] a")
    await page.click("button:text-is('Retry now')")
    await page.click("main button")
    assert "1 recipient changed" in (await page.text_content("main") or "")
    await page.goto(f"{desk.rig.base}/report")
    await page.fill("[name=recipient]", "old.example")
    await page.click("button:text-is('Show')")
    assert "STARTTLS not offered" in (await page.text_content("main") or "")
    await page.click("text=Sign out")
    assert await page.text_content("h1") == "Sign in"


async def test_keys_lead_to_search_and_rows(desk: Desk) -> None:
    await desk.rig.some_mail()
    page = await desk.open("vera")
    await page.goto(f"{desk.rig.base}/log")
    for _ in range(2):
        await page.keyboard.press("j")
    assert (
        await page.evaluate(
            "[...document.querySelectorAll('.row summary')].indexOf(document.activeElement)"
        )
        == 1
    )
    await page.keyboard.press("Enter")
    await expect(page.locator(".row[open]")).to_have_count(1)
    await page.keyboard.press("k")
    await page.keyboard.press("/")
    await page.keyboard.type("partner.example")
    await page.keyboard.press("Enter")
    await expect(page.locator("h1")).to_have_text("partner.example")
    await page.keyboard.press("?")
    await expect(page.locator("h1")).to_have_text("Help")


async def test_text_of_a_stranger_runs_no_script_and_breaks_no_page(desk: Desk) -> None:
    evil = '"><script>alert(1)</script><svg onload=alert(2)>\u202e' + "W" * 3000
    queue_id = await evil_mail(desk.rig, evil)
    desk.rig.options = replace(desk.rig.options, show_content=True)
    page = await desk.open("olga", viewport={"width": 360, "height": 740})
    for place in ("/", "/log", f"/message/{queue_id}", "/destination/evil.example", "/report"):
        await page.goto(desk.rig.base + place)
        await page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360, place
        assert await page.locator("script:not([src]), svg[onload]").count() == 0


async def test_report_prints_on_a4_with_its_times_in_utc(desk: Desk) -> None:
    await desk.rig.some_mail()
    page = await desk.open("vera", viewport={"width": 680, "height": 970})  # 180 mm at 96 dpi
    await page.goto(f"{desk.rig.base}/report?sender=legal.example")
    await page.emulate_media(media="print")
    assert await page.evaluate("document.documentElement.scrollWidth") <= 680
    for left_out in (".top", "form", "text=Export"):
        assert not await page.locator(left_out).first.is_visible()
    first = page.locator("[aria-labelledby=exceptions] td time").first
    shown = "time => getComputedStyle(time, '::after').content"
    assert await first.evaluate(shown) == '"2026-11-20 12:28:02 UTC"'
    pdf = await page.pdf(prefer_css_page_size=True)
    sizes = set(re.findall(rb"/MediaBox \[0 0 (\d+)\.?\d* (\d+)", pdf))
    assert sizes == {(b"594", b"841")}


@pytest.mark.parametrize("look", LOOKS)
async def test_each_page_fits_its_window(desk: Desk, tmp_path: Path, look: str) -> None:
    queue_id = await _picture_mail(desk.rig)
    target = PICTURES if os.environ.get("RELAY_PICTURES") == "1" else tmp_path
    target.mkdir(exist_ok=True)
    page = await desk.open("olga", **LOOKS[look])
    for name, place in PAGES.items():
        await page.goto(desk.rig.base + place.replace("{id}", queue_id))
        await page.wait_for_load_state()
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= LOOKS[look]["viewport"]["width"], name
        await page.screenshot(path=target / f"{name}-{look}.png")
        assert (target / f"{name}-{look}.png").stat().st_size > 5000


async def _picture_mail(rig: PageRig) -> str:
    """A day's mail that looks like one; the id of a message that waits."""
    for hours in range(23):
        for number in range(3 + hours % 5):
            at = rig.now - timedelta(hours=hours, minutes=7 * number + 3)
            await rig.mail(f"user{number}@partner.example", at=at, subject="Contract, draft 3")
        if hours % 6 == 2:
            await rig.mail("carol@old.example", SENT_IN_CLEAR, at=rig.now - timedelta(hours=hours))
    await rig.some_mail()
    for number in range(3):
        await rig.mail(f"x{number}@busy.example", LATER)
    wanted = QueueFilter(domain="strict.example")
    [listed] = await rig.store.list_messages(wanted, now=rig.now)
    return listed.queue_id


@pytest.mark.needs("npm")
@pytest.mark.parametrize("look", LOOKS)
async def test_axe_finds_nothing_serious(desk: Desk, axe: str, look: str) -> None:
    queue_id = await _picture_mail(desk.rig)
    page = await desk.open("olga", **LOOKS[look])
    found: dict[str, list[str]] = {}
    for name, place in PAGES.items():
        await page.goto(desk.rig.base + place.replace("{id}", queue_id))
        await page.evaluate(axe)
        result = await page.evaluate(
            "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})"
        )
        serious = [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}"
            for one in result["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        if serious:
            found[name] = serious
    assert found == {}


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library as text; it is fetched once a run."""
    directory = tmp_path_factory.mktemp("axe")
    shutil.copy(ROOT / "tests/clients/axe/package.json", directory)
    done = subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=patient(300),
        check=False,
    )
    if done.returncode:
        pytest.skip(f"axe-core cannot be fetched: {done.stderr[-200:]}")
    return (directory / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
