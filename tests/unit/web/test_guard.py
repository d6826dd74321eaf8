"""Who may look and who may act: sessions, roles, tokens, names, guesses."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from datetime import timedelta
from typing import Any
from unittest.mock import create_autospec

import pytest
from aiohttp.test_utils import make_mocked_request

from relay.queue.entry import State
from relay.queue.store import EventFilter
from relay.web.guard import PageRefused, cookie_name, is_readable_on_the_way
from relay.web.options import Role, WebOptions, WebUser
from relay.web.sessions import Sessions
from tests.fakes.page import LATER, NOW, PASSWORD, USERS, PageRig

PRIVATE = ("/", "/log", "/queue", "/report.csv", "/log/export", "/health", "/message/x")


async def test_nobody_sees_anything_without_signing_in(rig: PageRig) -> None:
    await rig.mail("bob@partner.example")
    stranger = await rig.browser()
    for place in PRIVATE:
        status, text = await stranger.get(place)
        assert status == 303
        assert "partner" not in text
        assert (await stranger.where(place)).startswith("/login")
    assert (await stranger.get("/log/live"))[0] == 401
    assert (await stranger.post("/queue/change", verb="remove", all="yes"))[0] == 401
    status, text = await stranger.get("/login?next=/log")
    assert status == 200
    assert 'value="/log"' in text


async def test_sign_in_leads_on_within_the_page_and_nowhere_else(rig: PageRig) -> None:
    browser = await rig.browser()
    for following, place in [
        ("/log?q=x", "/log?q=x"),
        ("https://evil.example/", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
    ]:
        answer = await browser.post("/login", name="olga", password=PASSWORD, next=following)
        assert (answer[0], answer[2]) == (303, place)


async def test_cookie_is_kept_from_scripts_and_other_sites(rig: PageRig) -> None:
    browser = await rig.browser()
    async with browser.http.post(
        rig.base + "/login", data={"name": "olga", "password": PASSWORD}, allow_redirects=False
    ) as answer:
        cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("relay=")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


@pytest.mark.parametrize("password", ["wrong", "", "x" * 5000])
async def test_every_failed_login_has_the_same_answer(rig: PageRig, password: str) -> None:
    browser = await rig.browser()
    _, text, _ = await browser.post("/login", name="olga", password=password)
    for name in ("nobody", "paul", "x" * 5000):
        status, other, _ = await browser.post("/login", name=name, password=password)
        assert (status, other) == (401, text)


async def test_guesses_are_stopped_and_the_right_password_with_them(rig: PageRig) -> None:
    browser = await rig.browser()
    for number in range(12):
        await browser.post("/login", name="olga", password=f"guess {number}")
    assert await browser.sign_in("olga") == 401
    assert rig.failures.total <= 12
    rig.now += timedelta(minutes=11)
    assert await browser.sign_in("olga") == 303


async def test_session_ends_with_logout_in_every_window(rig: PageRig) -> None:
    browser = await rig.browser("olga")
    copied = {c.key: c.value for c in browser.http.cookie_jar}
    assert (await browser.post("/logout"))[2] == "/login"
    thief = await rig.browser(cookies=copied)
    assert (await thief.get("/"))[0] == 303
    assert (await browser.get("/"))[0] == 303


@pytest.mark.parametrize(
    ("wait", "still_open"), [(timedelta(minutes=29), True), (timedelta(minutes=31), False)]
)
async def test_session_ends_when_it_is_idle(
    rig: PageRig, wait: timedelta, still_open: bool
) -> None:
    browser = await rig.browser("olga")
    rig.now += wait
    assert ((await browser.get("/"))[0] == 200) is still_open


async def test_session_ends_after_twelve_hours_however_busy(rig: PageRig) -> None:
    browser = await rig.browser("olga")
    for _ in range(28):
        rig.now += timedelta(minutes=25)
        assert (await browser.get("/help"))[0] == 200
    rig.now += timedelta(minutes=25)
    assert (await browser.get("/help"))[0] == 303


async def test_session_ends_with_its_user_or_its_password(rig: PageRig) -> None:
    browser = await rig.browser("olga")
    changed = WebUser("olga", USERS["vera"].password + "x", Role.OPERATOR)  # type: ignore[operator]
    rig.options = WebOptions(users=USERS | {"olga": changed})
    assert (await browser.get("/"))[0] == 303
    rig.options = WebOptions(users={"vera": USERS["vera"]})
    assert (await browser.get("/"))[0] == 303


async def test_viewer_may_not_change_the_queue(rig: PageRig) -> None:
    queue_id = await rig.mail("erin@busy.example", LATER)
    viewer = await rig.browser("vera")
    _, text = await viewer.get(f"/message/{queue_id}")
    assert "/queue/confirm" not in text
    for place in ("/queue/confirm", "/queue/change", "/destination/busy.example/probe"):
        status, text, _ = await viewer.post(place, verb="remove", id=queue_id)
        assert (status, "ask an operator" in text) == (403, True)
    assert (await rig.store.counts())[State.DEFERRED] == 1


@pytest.mark.parametrize("token", ["", "0" * 64, "other"])
async def test_form_without_the_token_of_its_session_changes_nothing(
    rig: PageRig, token: str
) -> None:
    queue_id = await rig.mail("erin@busy.example", LATER)
    browser, other = await rig.browser("olga"), await rig.browser("otto")
    sent = other.token if token == "other" else token
    status, _, _ = await browser.post("/queue/change", token=sent, verb="remove", id=queue_id)
    assert status == 403
    assert (await browser.post("/logout", token=sent))[0] == 403
    assert (await rig.store.counts())[State.DEFERRED] == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_form_of_another_site_changes_nothing(rig: PageRig, headers: dict[str, str]) -> None:
    queue_id = await rig.mail("erin@busy.example", LATER)
    browser = await rig.browser("olga")
    status, _, _ = await browser.post("/queue/change", headers, verb="remove", id=queue_id)
    assert status == 403
    assert (await rig.store.counts())[State.DEFERRED] == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8025", 200),
        ("localhost", 200),
        ("[::1]:8025", 200),
        ("RELAY.example", 200),
        ("named.example:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("relay.example.evil.example", 421),
        ("192.0.2.1", 421),
    ],
)
async def test_page_of_another_name_cannot_reach_us_by_rebinding(
    rig: PageRig, host: str, status: int
) -> None:
    rig.options = WebOptions(users=USERS, hosts=("named.example",))
    browser = await rig.browser("olga")
    assert (await browser.get("/help", Host=host))[0] == status
    assert (await browser.get("/login", Host=host))[0] == status


async def test_user_that_a_proxy_names_is_believed_from_its_network_only(rig: PageRig) -> None:
    rig.options = WebOptions(
        users=USERS,
        proxy_header="X-Remote-User",
        proxy_networks=(ipaddress.ip_network("127.0.0.0/8"),),
    )
    browser = await rig.browser()
    assert (await browser.get("/help", **{"X-Remote-User": "paul"}))[0] == 200
    assert (await browser.get("/help", **{"X-Remote-User": "nobody"}))[0] == 303
    assert (await browser.get("/help"))[0] == 303
    rig.options = WebOptions(
        users=USERS,
        proxy_header="X-Remote-User",
        proxy_networks=(ipaddress.ip_network("192.0.2.0/24"),),
    )
    assert (await browser.get("/help", **{"X-Remote-User": "paul"}))[0] == 303


async def test_verb_asks_with_the_number_of_messages_and_is_in_the_log(rig: PageRig) -> None:
    ids = [await rig.mail(f"x{n}@busy.example", LATER) for n in range(3)]
    browser = await rig.browser("olga")
    _, text, _ = await browser.post("/queue/confirm", verb="hold", domain="busy.example")
    assert "Hold 3 messages?" in text
    assert (await rig.store.counts())[State.DEFERRED] == 3
    status, _, job = await browser.post("/queue/change", verb="hold", domain="busy.example")
    assert status == 303
    _, text = await browser.get(job)
    assert "<strong>3</strong> recipients changed" in text
    assert (await rig.store.counts())[State.HELD] == 3
    await browser.post("/queue/change", verb="release", id=ids[:2])
    await browser.post("/queue/change", verb="retry", id=ids)
    assert rig.running.retried == 1
    assert (await rig.store.counts())[State.HELD] == 1
    wanted = EventFilter(names=frozenset({"operator"}))
    told = [json.loads(one.event.line) for one in await rig.store.find_events(wanted)]
    assert [(one["operator"], one["verb"], one["count"]) for one in told] == [
        ("olga", "hold", 3),
        ("olga", "release", 2),
        ("olga", "retry", 2),
    ]
    assert told[0]["filter"] == {"domain": "busy.example"}
    _, text = await browser.get("/log?event=operator")
    assert "olga: hold, 3 recipients (domain busy.example)" in text


async def test_verb_for_nothing_named_changes_nothing(rig: PageRig) -> None:
    await rig.mail("erin@busy.example", LATER)
    browser = await rig.browser("olga")
    wrong: list[dict[str, Any]] = [
        {},
        {"domain": " "},
        {"state": "gone"},
        {"verb": "explode", "all": "yes"},
    ]
    for fields in wrong:
        status, _, _ = await browser.post("/queue/change", **({"verb": "remove"} | fields))
        assert status == 400
    assert (await rig.store.counts())[State.DEFERRED] == 1


async def test_two_simultaneous_operators_each_get_their_own_result(rig: PageRig) -> None:
    ids = [await rig.mail(f"x{n}@busy.example", LATER) for n in range(2)]
    olga, otto = await rig.browser("olga"), await rig.browser("otto")
    _, _, first = await olga.post("/queue/change", verb="remove", id=ids)
    _, _, second = await otto.post("/queue/change", verb="hold", id=ids)
    assert "<strong>2</strong> recipients changed" in (await olga.get(first))[1]
    _, text = await otto.get(second)
    assert "<strong>0</strong> recipients changed" in text
    assert "2 of the messages were no longer in the queue" in text


def test_sessions_are_bounded_and_kept_as_digests() -> None:
    sessions = Sessions()
    tokens = [sessions.begin(USERS["olga"], NOW) for _ in range(25)]
    assert [sessions.find(token, NOW) is not None for token in tokens] == [False] * 5 + [True] * 20
    assert not any(token in repr(vars(sessions)) for token in tokens)
    assert len(set(tokens)) == 25


WAYS = [
    # client's address, over TLS, admin.web.insecure, shown
    ("127.0.0.1", False, False, True),
    ("::1", False, False, True),
    ("::ffff:127.0.0.1", False, False, True),
    ("192.0.2.9", False, False, False),
    ("::ffff:192.0.2.9", False, False, False),
    ("2001:db8::9", False, False, False),
    ("192.0.2.9", True, False, True),
    ("192.0.2.9", False, True, True),
]


async def test_page_over_plain_http_is_for_this_machine_unless_the_operator_says_otherwise(
    rig: PageRig,
) -> None:
    for remote, in_tls, insecure, is_shown in WAYS:
        rig.options = WebOptions(users=USERS, insecure=insecure)
        wire = {"peername": (remote, 4711), "ssl_object": object() if in_tls else None}
        transport = create_autospec(asyncio.Transport, instance=True)
        transport.get_extra_info.side_effect = wire.get
        request = make_mocked_request("GET", "/", {"Host": "localhost"}, transport=transport)
        if is_shown:
            rig.site.guard.check_way(request)
        else:
            with pytest.raises(PageRefused, match="over HTTPS only"):
                rig.site.guard.check_way(request)
        assert cookie_name(request) == ("__Host-relay" if in_tls else "relay")
        is_from_here = remote == "::1" or "127.0.0.1" in remote
        assert is_readable_on_the_way(request) is not (in_tls or is_from_here)
