"""Each page says what a person came for, and holds whatever a stranger wrote."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from dataclasses import replace
from datetime import timedelta
from html import unescape
from importlib.resources import files
from typing import Any

import pytest

from relay.deliver.reports import dsn_message
from relay.policy.rules import PolicyRules
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule
from relay.queue.settle import settle
from relay.queue.store import EventFilter, QueueFilter
from relay.route.answers import TlsaAnswer
from relay.web import facts
from relay.web.pages import queue
from tests.fakes.page import NO_TLS, NOBODY, NOW, SENT, SENT_IN_CLEAR, PageRig, evil_mail
from tests.fakes.queued import new_message

PAGES = (
    "/",
    "/?hours=720",
    "/log",
    "/queue",
    "/queue?all",
    "/queue?domain=busy.example",
    "/destination/partner.example",
    "/destination/unknown.example",
    "/policy",
    "/policy?from=a@legal.example&to=b@partner.example",
    "/report",
    "/report?sender=legal.example&recipient=partner.example",
    "/health",
    "/help",
)


@pytest.mark.parametrize("has_mail", [False, True], ids=["empty", "with mail"])
async def test_every_page_is_shown_with_its_headers(rig: PageRig, has_mail: bool) -> None:
    if has_mail:
        await rig.some_mail()
    browser = await rig.browser("olga")
    for place in PAGES:
        async with browser.http.get(rig.base + place) as answer:
            text = await answer.text()
            assert answer.status == 200, (place, text)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "same-origin"
            assert answer.headers["Cache-Control"] == "no-store"
            assert not re.search(r'\sstyle="|\son[a-z]+="|<script>|<style', text), place
            assert not re.search(r'(?:src|href|action)="(?:https?:)?//', text), place
            assert text.count("<h1") == 1


def test_stylesheet_and_script_are_small_and_ask_no_other_host() -> None:
    directory = files("relay.web") / "static"
    for name in ("page.css", "page.js"):
        text = (directory / name).read_text(encoding="utf-8")
        assert len(text.encode()) < 30_000
        assert not re.search(r"https?://|@import|url\(|eval\(", text), name


async def test_overview_says_how_mail_went_and_what_is_in_trouble(rig: PageRig) -> None:
    await rig.some_mail()
    _, text = await (await rig.browser("vera")).get("/")
    assert re.search(r"Delivered</span><strong>21<", text)
    assert re.search(r"Failed for good</span><strong>1<", text)
    assert re.search(r"In clear</span><strong>1<", text)
    trouble = text[text.index("Destinations in trouble") :]
    assert "strict.example" in trouble
    assert "certificate has expired" in trouble
    assert "mailbox busy" in trouble


async def test_overview_warns_of_clear_mail_to_a_host_that_was_verified(rig: PageRig) -> None:
    await rig.mail("a@old.example", SENT, at=NOW - timedelta(days=9))
    await rig.mail("b@new.example", SENT_IN_CLEAR)
    browser = await rig.browser("vera")
    assert "over verified TLS before" not in (await browser.get("/"))[1]
    await rig.mail("b@old.example", SENT_IN_CLEAR)
    assert "Mail to old.example went out in clear today" in (await browser.get("/"))[1]


async def test_overview_warns_where_dane_is_on_and_nobody_validates(rig: PageRig) -> None:
    browser = await rig.browser("vera")
    assert "DANE protects no mail" not in (await browser.get("/"))[1]
    rig.validates = False
    assert "DANE protects no mail" in (await browser.get("/"))[1]


async def test_destination_shows_the_tlsa_records_of_today(rig: PageRig) -> None:
    record = bytes([3, 1, 1]) + bytes(range(32))
    name = "_25._tcp.mx.partner.example"
    rig.published.tlsa[name] = TlsaAnswer((record,), authenticated=True)
    browser = await rig.browser("vera")
    _, text = await browser.get("/destination/partner.example")
    assert "TLSA records at 1 of 1 hosts" in text
    assert f"3 1 1 {record[3:].hex()}" in text
    _, text = await browser.get("/destination/other.example")
    assert "TLSA records: none" in text


async def test_destination_does_not_wait_for_name_servers_that_are_silent(rig: PageRig) -> None:
    never = asyncio.Event()

    async def silent(*_: str, **__: bool) -> dict[str, Any]:
        await never.wait()
        raise AssertionError

    rig.running.explained = silent
    browser = await rig.browser("vera")
    status, text = await browser.get("/destination/partner.example")
    assert status == 200
    assert "the name servers have not answered yet" in text


async def test_log_is_filtered_and_paged(rig: PageRig) -> None:
    await rig.some_mail()
    browser = await rig.browser("vera")

    async def found(query: str) -> int:
        _, text = await browser.get(f"/log?{query}")
        return text.count('<details class="row ')

    assert await found("protection=clear") == 1
    assert await found("event=failed") == 1
    assert await found("event=deferred") == 2
    assert await found("recipient=PARTNER.example&event=delivered") == 20
    assert await found("q=carol") == 2
    assert await found("source=message") == 48
    assert await found("source=destination") == 0
    assert await found("begin=2026-11-21") == 0
    for number in range(20):
        await rig.mail(f"x{number}@partner.example", queue_id=f"ID{number}")
    _, text = await browser.get("/log")
    assert text.count('<details class="row ') == 50
    older = re.search(r'rel="next" href="([^"]+)"', text)
    assert older is not None
    _, second = await browser.get(older[1].replace("&amp;", "&"))
    assert second.count('<details class="row ') == 38
    ids = re.findall(r'id="e(\d+)"', text + second)
    assert len(set(ids)) == 88
    assert ids == sorted(ids, key=int, reverse=True)


async def test_export_has_every_event_that_matches(rig: PageRig) -> None:
    await rig.some_mail()
    browser = await rig.browser("vera")
    _, lines = await browser.get("/log/export?format=jsonl&event=delivered")
    assert len(lines.splitlines()) == 21
    assert {json.loads(line)["event"] for line in lines.splitlines()} == {"delivered"}
    _, table = await browser.get("/log/export?format=csv&protection=clear")
    [row] = csv.DictReader(io.StringIO(table))
    assert row["recipients"] == "carol@old.example"
    assert row["protection"] == "clear"
    _, everything = await browser.get("/log/export?format=csv")
    assert len(list(csv.reader(io.StringIO(everything)))) == 49


async def test_message_tells_its_story_from_acceptance_to_the_next_attempt(rig: PageRig) -> None:
    await rig.some_mail()
    browser = await rig.browser("vera")
    [listed] = await rig.store.list_messages(QueueFilter(domain="strict.example"), now=rig.now)
    _, text = await browser.get(f"/message/{listed.queue_id}")
    assert "192.0.2.1 (app.legal.example)" in text
    assert "not sent: TLS required, certificate has expired (mx.strict.example, 4.7.5)" in text
    assert "require_tls: true (message)" in text
    assert re.search(r"Next attempt: <time.*, by queue.retry after attempt 1<", text)
    assert "Header section" in text
    assert "body" not in text[text.index("Header section") :].replace("</body>", "")
    rig.options = type(rig.options)(users=rig.options.users, show_content=True)
    _, text = await browser.get(f"/message/{listed.queue_id}")
    assert "body\n" in text[text.index(">Content<") :]
    status, text = await browser.get("/message/ABSENT")
    assert (status, "No such message" in text) == (404, True)


async def test_story_tells_the_client_the_look_up_and_every_host(rig: PageRig) -> None:
    queue_id = await rig.mail("dave@strict.example", NO_TLS)
    _, text = await (await rig.browser("vera")).get(f"/message/{queue_id}")
    told = re.sub(r"<[^>]+>", " ", text)
    for said in (
        "Client's TLS TLSv1.3, TLS_AES_256_GCM_SHA384",
        "Client's user app1",
        "Hosts named by MX records of the domain",
        "Signed (DNSSEC) no",
        "1. 10 mx0.strict.example [192.0.2.18]",
        "2. 20 mx.strict.example [192.0.2.8]",
        "Tried before mx0.strict.example [192.0.2.18]: STARTTLS not offered",
        "Certificate of CN=mail.strict.example",
        "valid 2026-08-17 12:30 UTC to 2026-11-15 12:30 UTC",
        "does not match it expired on 2026-11-15; it is for mail.strict.example, not for"
        " mx.strict.example",
        "Published policy MTA-STS, enforce",
        "What is wrong with it certificate-expired",
        "Host name authentic no",
    ):
        assert said in re.sub(r"\s+", " ", told).replace("&#39;", "'"), said


def test_story_tells_what_a_host_has_shown_before() -> None:
    alarm = {"before": "verified", "now": "none", "host": "mx.a.example", "since": "2030-01-31"}
    status = {"policy-type": "no-policy-found", "memory": alarm}
    told = dict(facts._policy(status))
    expected = "verified before, none now (mx.a.example, last 2030-01-31)"
    assert told["Less than shown before"] == expected
    assert dict(facts._policy(status | {"memory": None}))["Less than shown before"] is None


async def test_story_links_a_message_and_the_reports_on_it(rig: PageRig) -> None:
    queue_id = await rig.mail("nobody@partner.example", NOBODY)
    other = await rig.mail("bob@partner.example")
    new = new_message("nobody@partner.example", sender="alice@legal.example", queue_id=queue_id)
    entry = Entry(new.message, new.recipients)
    [report] = settle(entry, {0: NOBODY}, schedule=RetrySchedule(), now=NOW).reports
    dsn = dsn_message(
        report, header=new.content, rules=PolicyRules(), hostname="relay.example", now=NOW
    )
    await rig.store.accept(dsn)
    browser = await rig.browser("vera")
    _, text = await browser.get(f"/message/{queue_id}")
    assert "Reports sent to alice@legal.example" in text
    assert f'href="/message/{dsn.message.queue_id}"' in text
    _, text = await browser.get(f"/message/{dsn.message.queue_id}")
    assert f'a report on <a href="/message/{queue_id}"' in text
    assert "Reports sent" not in (await browser.get(f"/message/{other}"))[1]


async def test_message_that_is_delivered_has_its_story_from_the_events(rig: PageRig) -> None:
    queue_id = await rig.mail("bob@partner.example")
    _, text = await (await rig.browser("vera")).get(f"/message/{queue_id}")
    for said in ("Quarterly figures", "TLS verified, mx.partner.example: 250", "TLSv1.3"):
        assert said in text
    for said in ("CN=Example Root CA 2", "mx2.partner.example", "9f86d081884c"):
        assert said in text


async def test_report_has_the_numbers_of_the_command_line(rig: PageRig) -> None:
    await rig.some_mail()
    await rig.store.log_written(1000)
    await rig.store.purge_events(before=NOW + timedelta(days=1))
    assert len(await rig.store.find_events(EventFilter())) == 1
    browser = await rig.browser("vera")
    query = "sender=LEGAL.example&since=2026-11-01&until=2026-11-30"
    _, text = await browser.get(f"/report?{query}")
    assert re.search(r"over verified TLS</th><td class=\"num\">20<", text)
    assert "Exceptions: 3" in text
    _, said = await browser.get(f"/report.json?{query}")
    told = json.loads(said)
    assert sum(one["number"] for one in told["counts"] if one["result"] == "delivered") == 21
    assert len(told["exceptions"]) == 3
    _, table = await browser.get(f"/report.csv?{query}")
    kinds = [row["kind"] for row in csv.DictReader(io.StringIO(table))]
    assert kinds.count("exception") == 3
    status, _ = await browser.get("/report?since=2026-11-30&until=2026-11-01")
    assert status == 400


async def test_search_leads_to_the_page_of_its_text(rig: PageRig) -> None:
    queue_id = await rig.mail("bob@partner.example")
    browser = await rig.browser("vera")
    assert await browser.where(f"/search?q={queue_id.lower()}") == f"/message/{queue_id}"
    assert await browser.where("/search?q=Partner.Example") == "/destination/partner.example"
    assert await browser.where("/search?q=bob@partner.example") == "/log?q=bob%40partner.example"
    assert await browser.where("/search?q=%3C1@x%3E") == "/log?q=1%40x"
    assert await browser.where("/search?q=") == "/log"


async def test_search_of_a_large_queue_ends_soon_unless_it_may_take_long(
    rig: PageRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_SEARCH_SECONDS", 0.0)  # as if the queue were very large
    await rig.mail("bob@partner.example", None)
    browser = await rig.browser("vera")
    _, text = await browser.get("/queue?sender=alice@legal.example")
    assert "bob@partner.example" not in text
    further = re.search(r'Nothing was found so far: .*<a href="([^"]+)">Search it all', text)
    assert further is not None
    _, text = await browser.get(unescape(further[1]))
    assert "bob@partner.example" in text


async def test_policy_says_where_rules_stand_and_explains(rig: PageRig) -> None:
    browser = await rig.browser("vera")
    _, text = await browser.get("/policy?from=a@legal.example&to=b@partner.example&skip=yes")
    assert "relay.yaml:12" in text
    assert "mx.partner.example" in text
    assert "not sent here" in text
    assert "REQUIRETLS</dt>" not in text
    _, text = await browser.get("/policy?to=b@partner.example&requiretls=yes&no=yes")
    assert "REQUIRETLS</dt><dd>yes" in text
    _, text = await browser.get("/policy?to=nonsense")
    assert "The address cannot be read" in text


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}\u202egnp.exe'


async def test_no_text_of_a_stranger_is_run_as_a_script(rig: PageRig) -> None:
    queue_id = await evil_mail(rig, EVIL)
    rig.options = replace(rig.options, show_content=True)
    browser = await rig.browser("olga")
    places = [*PAGES, f"/message/{queue_id}", "/destination/evil.example", "/log?q=%3Cscript%3E"]
    for place in places:
        status, text = await browser.get(place)
        assert status == 200
        assert "<script>alert" not in text, place
        assert "<img" not in text, place
        assert "<b>x" not in text, place
        assert "\u202e" not in text, place
        assert "49" not in re.findall(r"onerror=alert\(2\)&gt;(\d+)", text), place
    _, table = await browser.get("/log/export?format=csv")
    assert not any(line.startswith(("=", "+", "-", "@")) for line in table.splitlines())
    assert NOBODY.code == 550
