"""The HTTP interface on a real store: what a client is told, and what is in the queue then."""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

from relay.admin.domain_settings import SettingsInForce
from relay.api import HttpOptions
from relay.api.keys import Keys
from relay.policy.rules import TlsRule
from relay.policy.settings import Setting, Source
from relay.queue.store import QueueFilter, QueueFull, SpoolError
from relay.submit.secrets import SecretVerdict
from tests.fakes.http import KEY, NOW, RULES, Rig, auth
from tests.fakes.queued import event, new_message
from tests.fakes.waiting import patient

NOT_UTF8 = b'--x\r\nContent-Disposition: form-data; name="to"\r\n\r\n\xff\r\n--x--\r\n'


# --- sending --------------------------------------------------------------------------------------


async def test_message_answered_200_is_in_the_queue(rig: Rig) -> None:
    status, said = await rig.send(
        subject="Grüße", o_require_tls="yes", o_tag=["a", "b"], v_order="7"
    )
    assert (status, said["message"]) == (200, "Queued. Thank you.")
    [entry] = await rig.claimed()
    assert said["id"] == f"<{entry.message.queue_id}@example.com>"
    assert (entry.message.reverse_path, entry.recipients[0].address) == (
        "ann@example.com",
        "bob@dest.example",
    )
    assert entry.settings.require_tls == Setting(True, Source.MESSAGE)
    assert entry.message.summary.subject == "Grüße"
    assert entry.message.origin == "http"
    content = await rig.content(entry)
    assert content.startswith(
        b"Received: from unknown ([127.0.0.1])\r\n\tby relay.example with HTTP id "
    )
    assert len(content) == entry.message.size_bytes
    [event] = await rig.store.events_after(0)
    told = json.loads(event.event.line)
    assert (told["event"], told["tags"], told["user-variables"]) == (
        "accepted",
        ["a", "b"],
        {"order": "7"},
    )


async def test_a_form_may_be_urlencoded(rig: Rig) -> None:
    fields = [
        ("from", "ann@example.com"),
        ("to", "a@dest.example"),
        ("to", "b@dest.example"),
        ("html", "<p>ü"),
    ]
    status, _ = await rig.ask("POST", "/v3/example.com/messages", data=fields)
    assert status == 200
    [entry] = await rig.claimed()
    assert [one.address for one in entry.recipients] == ["a@dest.example", "b@dest.example"]


@pytest.mark.parametrize("size", [10, 300 * 1024, 2 * 1024 * 1024])
async def test_an_attachment_of_any_size_arrives_whole(rig: Rig, size: int) -> None:
    octets = bytes(range(256)) * (size // 256) + b"!"
    assert (await rig.send(attachment=octets))[0] == 200
    [entry] = await rig.claimed()
    message = email.message_from_bytes(await rig.content(entry), policy=email.policy.default)
    [attachment] = message.iter_attachments()
    assert attachment.get_content() == octets


async def test_policy_fields_are_obeyed_and_taken_off(rig: Rig) -> None:
    assert (await rig.send(**{"h:X-Require-TLS": "yes"}))[0] == 200
    [entry] = await rig.claimed()
    assert entry.settings.require_tls == Setting(True, Source.MESSAGE)
    assert b"X-Require-TLS" not in await rig.content(entry)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"h:X-Require-TLS": "perhaps"}, 'X-Require-TLS: "perhaps" is neither yes nor no'),
        (
            {"h:X-Require-TLS": "no", "o_require_tls": "yes"},
            "o:require-tls contradicts a header field of the message",
        ),
        (
            {"h:X-Mailgun-Drop-Message": "yes", "o_testmode": "no"},
            "o:testmode contradicts a header field of the message",
        ),
        (
            {"h:X-Mailgun-Template-Name": "welcome"},
            'X-Mailgun-Template-Name: "welcome" is not supported by this relay',
        ),
        ({"from": ""}, "from parameter is missing"),
    ],
)
async def test_refused_message_is_not_in_the_queue(rig: Rig, fields: Any, said: str) -> None:
    assert await rig.send(**fields) == (400, {"message": said})
    assert await rig.claimed() == []
    assert await rig.store.events_after(0) == []


async def test_a_message_for_later_is_due_then_and_not_before(rig: Rig) -> None:
    assert (
        await rig.send(o_deliverytime="Fri, 20 Nov 2026 13:00:00 +0000", o_deliver_within="5m")
    )[0] == 200
    assert await rig.claimed() == []
    rig.now = NOW + timedelta(hours=1)
    [entry] = await rig.claimed()
    assert entry.message.begins == rig.now


async def test_message_in_test_mode_over_http_has_its_events_and_is_not_sent(rig: Rig) -> None:
    assert (await rig.send(o_testmode="yes"))[0] == 200
    rig.now = NOW + timedelta(days=30)
    assert await rig.claimed() == []
    assert await rig.store.list_messages(QueueFilter(), now=rig.now) == []
    events = [json.loads(one.event.line) for one in await rig.store.events_after(0)]
    assert [one["event"] for one in events] == ["accepted", "delivered"]
    assert events[1]["delivery-status"]["code"] == 650
    assert events[1]["flags"] == {"is-test-mode": True}


@pytest.mark.parametrize("path", ["messages", "messages.mime"])
async def test_mailguns_header_fields_are_obeyed_and_taken_off(rig: Rig, path: str) -> None:
    fields = {
        "X-Mailgun-Tag": "welcome",
        "X-Mailgun-Variables": '{"order": 7}',
        "X-Mailgun-Track": "no",
        "X-Mailgun-Deliver-By": "Fri, 20 Nov 2026 13:00:00 +0000",
        "X-Mailgun-Dkim": "no",
    }
    if path == "messages":
        said = await rig.send(o_tag="b", **{f"h:{name}": text for name, text in fields.items()})
    else:
        lines = "".join(f"{name}: {text}\n" for name, text in fields.items())
        mime = f"From: ann@example.com\n{lines}\ntext\n".encode()
        said = await rig.form(
            f"/v3/example.com/{path}", to="bob@dest.example", message=mime, o_tag="b"
        )
    assert said[0] == 200
    assert await rig.claimed() == []
    rig.now = NOW + timedelta(hours=1)
    [entry] = await rig.claimed()
    terms = entry.message.terms
    assert terms is not None
    assert set(terms.tags) == {"welcome", "b"}
    assert (terms.variables, terms.is_signed) == ((("order", "7"),), False)
    assert b"X-Mailgun" not in await rig.content(entry)


@pytest.mark.parametrize("path", ["messages", "messages.mime"])
async def test_a_message_with_mailguns_drop_field_goes_nowhere(rig: Rig, path: str) -> None:
    if path == "messages":
        said = await rig.send(**{"h:X-Mailgun-Drop-Message": "yes"})
    else:
        mime = b"From: ann@example.com\nX-Mailgun-Drop-Message: yes\n\ntext\n"
        said = await rig.form(f"/v3/example.com/{path}", to="bob@dest.example", message=mime)
    assert said[0] == 200
    assert await rig.claimed() == []
    events = [json.loads(one.event.line) for one in await rig.store.events_after(0)]
    assert [one["event"] for one in events] == ["accepted", "delivered"]
    assert events[1]["delivery-status"]["code"] == 650


async def test_mime_message_is_sent_unchanged(rig: Rig) -> None:
    mime = (
        b"From: Ann <ann@example.com>\nSubject: x\nBcc: c@dest.example\n"
        b"X-Skip-Verification: yes\n\nhello\n"
    )
    path = "/v3/example.com/messages.mime"
    status, said = await rig.form(path, to="bob@dest.example", message=mime)
    assert status == 200
    [entry] = await rig.claimed()
    content = await rig.content(entry)
    header, _, body = content.partition(b"\r\n\r\n")
    assert body == b"hello\r\n"
    assert header.endswith(b"From: Ann <ann@example.com>\r\nSubject: x")
    assert f"Message-ID: {said['id']}".encode() in header
    assert entry.settings.skip_verification == Setting(True, Source.MESSAGE)
    assert await rig.form(path, to="bob@dest.example", message="text") == (
        400,
        {"message": "'message' parameter is not a file"},
    )


async def test_a_message_to_an_address_beyond_ascii_needs_smtputf8(rig: Rig) -> None:
    assert (await rig.send(to="jörg@dest.example"))[0] == 200
    [entry] = await rig.claimed()
    assert entry.message.smtputf8
    assert entry.message.eight_bit


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFull("full"), 503),
        (SpoolError("the disk fails"), 503),
        (RuntimeError("a mistake"), 500),
    ],
)
async def test_trouble_of_the_relay_is_5xx_and_the_message_may_be_sent_again(
    rig: Rig, error: Exception, status: int
) -> None:
    rig.sink.trouble = error
    assert (await rig.send(attachment=b"x" * 600_000))[0] == status
    rig.sink.trouble = None
    assert await rig.claimed() == []
    assert (await rig.send(attachment=b"x" * 600_000))[0] == 200


async def test_a_message_that_is_too_large_is_refused_however_it_comes(rig: Rig) -> None:
    octets = b"x" * (6 * 1024 * 1024)
    assert (await rig.send(attachment=octets)) == (413, {"message": "Request entity too large"})

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(octets), 65536):
            yield octets[start : start + 65536]

    field = "application/x-www-form-urlencoded"
    status, _ = await rig.ask(
        "POST", "/v3/example.com/messages", data=pieces(), headers={"Content-Type": field}
    )
    assert status == 413
    assert (await rig.send(attachment=b"x" * (3600 * 1024)))[0] == 413
    assert await rig.claimed() == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"nothing of the kind"),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data; name=from\r\n\r\n",
        ),
        ("multipart/form-data; boundary=x", NOT_UTF8),
        ("multipart/form-data; boundary=x", NOT_UTF8.replace(b"to", b"\xf1\x02")),
        ("application/x-www-form-urlencoded", b"from=%ff&to=x"),
        ("application/x-www-form-urlencoded", b"a=1&" * 20_000),
        ("application/x-www-form-urlencoded; charset=klingon", b"from=a"),
        ("application/json", b"{}"),
        ("text/plain", b"\0"),
    ],
)  # fmt: skip
async def test_a_body_that_is_no_form_is_refused(rig: Rig, kind: str, body: bytes) -> None:
    status, said = await rig.ask(
        "POST", "/v3/example.com/messages", data=body, headers={"Content-Type": kind}
    )
    assert (status, set(said)) == (400, {"message"})


async def test_a_thousand_recipients_may_be_a_thousand_fields(rig: Rig) -> None:
    many = [f"r{number}@dest.example" for number in range(1000)]
    assert (await rig.send(to=many))[0] == 200
    [entry] = await rig.claimed()
    assert len(entry.recipients) == 1000
    assert await rig.send(to=[*many, "one@too.example"]) == (
        400,
        {"message": "Too many recipients, max is 1000"},
    )


async def test_a_domain_that_may_not_send_is_not_found_in_mailguns_words(rig: Rig) -> None:
    rig.options = HttpOptions(api_keys=(KEY,), domains=("named.example",))
    for path in ("/v3/example.com/messages", "/v3/example.com/messages.mime"):
        assert await rig.send(path) == (404, {"message": "Domain not found: example.com"})
    for path in ("connection", "webhooks"):
        found = await rig.ask("GET", f"/v3/domains/example.com/{path}")
        assert found == (404, {"message": "Domain not found"})
    assert await rig.ask("GET", "/v3/example.com/events") == (404, {"message": "Domain not found"})


async def test_body_that_takes_too_long_is_408(rig: Rig) -> None:
    object.__setattr__(rig.api, "request_seconds", 0.2)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"from=ann"
        await asyncio.sleep(2)

    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    status, said = await rig.ask("POST", "/v3/example.com/messages", data=slowly(), headers=kind)
    assert (status, said) == (408, {"message": "The request took too long to come"})


@pytest.mark.parametrize(("encoding", "octets"), [("base64", b"aGVs\r\nbG8="), ("7bit", b"hello")])
async def test_a_part_may_have_a_transfer_encoding(rig: Rig, encoding: str, octets: bytes) -> None:
    parts = [
        (name, b"", value)
        for name, value in (("from", b"a@example.com"), ("to", b"b@dest.example"))
    ]
    parts.append(("text", f"Content-Transfer-Encoding: {encoding}\r\n".encode(), octets))
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%b"\r\n%b\r\n%b\r\n'
        % (name.encode(), field, value)
        for name, field, value in parts
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _ = await rig.ask(
        "POST", "/v3/example.com/messages", data=body + b"--x--\r\n", headers=kind
    )
    assert status == 200
    [entry] = await rig.claimed()
    assert (await rig.content(entry)).endswith(b"\r\n\r\nhello\r\n")


# --- keys -----------------------------------------------------------------------------------------


async def test_a_wrong_key_is_refused_in_mailguns_words(rig: Rig) -> None:
    for headers in (
        auth("wrong"),
        auth(KEY, "root"),
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic !"},
    ):
        assert await rig.ask("GET", "/v4/domains", headers=headers) == (
            401,
            {"message": "Invalid private key"},
        )
    assert await rig.ask("POST", "/v3/example.com/messages", headers=auth("wrong")) == (
        401,
        "Forbidden",
    )


async def test_a_client_with_too_many_wrong_keys_waits_and_a_right_one_still_gets_in(
    rig: Rig,
) -> None:
    for _ in range(10):
        assert (await rig.ask("GET", "/v4/domains", headers=auth("wrong")))[0] == 401
    assert (await rig.ask("GET", "/v4/domains", headers=auth("wrong")))[0] == 429
    assert (await rig.ask("GET", "/v4/domains"))[0] == 200
    rig.now += timedelta(minutes=11)
    assert (await rig.ask("GET", "/v4/domains", headers=auth("wrong")))[0] == 401


async def test_wrong_keys_from_one_ipv6_network_count_for_one_client() -> None:
    keys = Keys(lambda: [KEY], clock=lambda: NOW)
    wrong = auth("wrong")["Authorization"]
    for number in range(10):
        assert await keys.judge(wrong, f"2001:db8::{number}") is SecretVerdict.WRONG
    assert await keys.judge(wrong, "2001:db8::ffff") is SecretVerdict.WAIT
    assert await keys.judge(wrong, "2001:db8:0:1::") is SecretVerdict.WRONG
    keys.close()


async def test_a_hashed_key_costs_its_hash_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.options = HttpOptions(api_keys=("other", PasswordHasher().hash("hashed-key")))
    verified: list[bytes] = []
    real = PasswordHasher.verify

    def counted(self: PasswordHasher, known: str, key: bytes) -> bool:
        verified.append(key)
        return real(self, known, key)

    monkeypatch.setattr(PasswordHasher, "verify", counted)
    for _ in range(3):
        assert (await rig.ask("GET", "/v4/domains", headers=auth("hashed-key")))[0] == 200
    assert verified == [b"hashed-key"]
    assert (await rig.ask("GET", "/v4/domains", headers=auth("wrong")))[0] == 401
    rig.options = HttpOptions(api_keys=("other",))
    assert (await rig.ask("GET", "/v4/domains", headers=auth("hashed-key")))[0] == 401


async def test_ten_of_a_hundred_simultaneous_guesses_are_checked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bytes] = []

    def wrong(self: PasswordHasher, known: str, key: bytes) -> bool:
        looked.append(key)
        raise VerifyMismatchError

    known = [PasswordHasher().hash("hashed-key")]
    keys = Keys(lambda: known, clock=lambda: rig.now)
    right = auth("hashed-key")["Authorization"]
    assert await keys.judge(right, "192.0.2.1") is SecretVerdict.RIGHT
    monkeypatch.setattr(PasswordHasher, "verify", wrong)
    guesses = [keys.judge(auth(f"guess-{n}")["Authorization"], "192.0.2.1") for n in range(120)]
    judging = asyncio.gather(*guesses)
    await asyncio.sleep(0)
    assert await keys.judge(right, "192.0.2.1") is SecretVerdict.RIGHT, "remembered: at once"
    verdicts = await judging
    assert (verdicts.count(SecretVerdict.WRONG), verdicts.count(SecretVerdict.WAIT)) == (10, 110)
    assert len(looked) == 10
    keys.close()


async def test_a_right_key_that_is_new_gets_in_beside_guessers_when_it_comes_again() -> None:
    now = NOW
    known = [PasswordHasher().hash("hashed-key")]
    keys = Keys(lambda: known, clock=lambda: now)
    for n in range(12):
        await keys.judge(auth(f"guess-{n}")["Authorization"], "192.0.2.1")
    right = auth("hashed-key")["Authorization"]
    assert await keys.judge(right, "192.0.2.1") is SecretVerdict.WAIT
    assert await keys.judge(auth("guess-99")["Authorization"], "192.0.2.1") is SecretVerdict.WAIT
    assert await keys.judge(right, "192.0.2.1") is SecretVerdict.RIGHT
    for n in range(20, 24):
        guess = auth(f"guess-{n}")["Authorization"]
        assert await keys.judge(guess, "192.0.2.1") is SecretVerdict.WAIT
        assert await keys.judge(guess, "192.0.2.1") is SecretVerdict.WAIT, (
            "one a second is looked at"
        )
    keys.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://relay.example"}, 200),
        ({"Origin": "http://RELAY.example:80"}, 200),
        ({"Referer": "https://relay.example/page?x"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "https://relay.example.evil.example"}, 403),
        ({"Origin": "https://relay.example:8443"}, 403),
        ({"Origin": "https://relay.example@evil.example"}, 403),
        ({"Referer": "https://evil.example\\\\@relay.example/"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Referer": "https://evil.example/relay.example"}, 403),
        ({"Origin": "https://relay.example", "Referer": "https://evil.example/"}, 403),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
    ],
)
@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"]
)
async def test_a_page_of_another_site_changes_nothing_in_a_browser_of_any_year(
    rig: Rig, headers: dict[str, str], status: int, kind: str
) -> None:
    """A form needs no leave of ours to be sent, and a browser adds the key it was given once."""
    body = {
        "multipart/form-data; boundary=x": (
            b'--x\r\nContent-Disposition: form-data; name="require_tls"\r\n\r\nyes\r\n--x--\r\n'
        )
    }.get(kind, b"require_tls=yes")
    sent = {"Host": "relay.example", "Content-Type": kind, **headers}
    path = "/v3/domains/example.com/connection"
    answered = (await rig.ask("PUT", path, data=body, headers=sent))[0]
    if kind == "text/plain" and status == 200:
        status = 400
    assert answered == status
    assert ("example.com" in rig.settings.domains) == (status == 200)


# --- settings of domains --------------------------------------------------------------------------


async def test_settings_are_in_force_at_once_over_smtp_and_http(rig: Rig) -> None:
    path = "/v3/domains/Example.COM/connection"
    status, said = await rig.form(path, "PUT", require_tls="True", skip_verification="False")
    assert status == 200
    assert said == {
        "message": "Domain connection settings have been updated, may take 10 minutes to fully"
        " propagate",
        "require-tls": True,
        "skip-verification": False,
        "require_tls": True,
        "skip_verification": False,
    }
    both = {"require_tls": True, "skip_verification": False}
    assert await rig.ask("GET", path) == (200, {"connection": both, **both})
    assert rig.settings.over(RULES).overlay["example.com"] == TlsRule(True, False)
    await rig.send()
    [entry] = await rig.claimed()
    assert entry.settings.require_tls == Setting(True, Source.API, "example.com")


async def test_settings_of_a_locked_domain_are_shown_as_they_are_in_effect(rig: Rig) -> None:
    path = "/v4/domains/locked.example"
    status, said = await rig.form(path, "PUT", require_tls="no", skip_verification="yes")
    assert (status, said["domain"]["require_tls"], said["domain"]["skip_verification"]) == (
        200,
        True,
        False,
    )
    status, said = await rig.ask("GET", "/v3/domains/locked.example")
    assert said["domain"]["require_tls"] is True


async def test_settings_are_there_after_a_restart(rig: Rig) -> None:
    await rig.form("/v3/domains/example.com/connection", "PUT", require_tls="yes")
    again = SettingsInForce(rig.store.api_state)
    await again.load()
    assert again.over(RULES).overlay == {"example.com": TlsRule(True, None)}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 400),
        ({"require_tls": "perhaps"}, 400),
        ({"require_tls": ["yes", "no"]}, 400),
        ({"require_tls": ["yes", "1"]}, 200),
    ],
)
async def test_setting_of_a_domain_is_yes_or_no(rig: Rig, fields: Any, status: int) -> None:
    assert (await rig.form("/v3/domains/example.com/connection", "PUT", **fields))[0] == status


async def test_domains_are_those_of_options_rules_and_settings(rig: Rig) -> None:
    await rig.form("/v3/domains/example.com/connection", "PUT", require_tls="yes")
    rig.options = HttpOptions(api_keys=(KEY,), domains=("named.example",))
    for path in ("/v3/domains", "/v4/domains"):
        _, said = await rig.ask("GET", path)
        assert [one["name"] for one in said["items"]] == [
            "example.com",
            "locked.example",
            "named.example",
        ]
    assert (await rig.send())[0] == 404


# --- events ---------------------------------------------------------------------------------------


async def sent(rig: Rig, count: int, **fields: Any) -> list[str]:
    ids = []
    for _ in range(count):
        rig.now += timedelta(seconds=1)
        ids.append((await rig.send(**fields))[1]["id"].strip("<>"))
    return ids


async def walk(rig: Rig, first: str) -> list[str]:
    """The message ids on all pages in a direction, as a client follows the links."""
    found: list[str] = []
    url = first
    for _ in range(50):
        status, page = await rig.ask("GET", url)
        assert status == 200
        if not page["items"]:
            return found
        found += [item["message"]["headers"]["message-id"] for item in page["items"]]
        url = page["paging"]["next"][len(f"http://{rig.http.host}:{rig.http.port}") :]
    raise AssertionError("the pages have no end")


@pytest.mark.parametrize("ascending", ["yes", "no"])
async def test_pages_show_every_event_once_in_either_direction(rig: Rig, ascending: str) -> None:
    ids = await sent(rig, 7)
    ids = ids if ascending == "yes" else ids[::-1]
    assert await walk(rig, f"/v3/example.com/events?limit=3&ascending={ascending}") == ids
    # By the parameters of the link alone, too, as the Python client does.
    _, page = await rig.ask("GET", f"/v3/example.com/events?limit=3&ascending={ascending}")
    query = page["paging"]["next"].partition("?")[2]
    assert await walk(rig, f"/v3/example.com/events?limit=3&{query}") == ids[3:]


async def test_paging_can_turn_back_on_every_page(rig: Rig) -> None:
    ids = await sent(rig, 5)

    async def page(url: str) -> tuple[list[str], dict[str, str]]:
        _, said = await rig.ask("GET", url.partition(str(rig.http.port))[2] or url)
        return [item["message"]["headers"]["message-id"] for item in said["items"]], said["paging"]

    first, links = await page("/v3/example.com/events?limit=2&ascending=yes")
    second, links = await page(links["next"])
    third, links = await page(links["next"])
    end, links = await page(links["next"])
    assert (first, second, third, end) == (ids[:2], ids[2:4], ids[4:], [])
    back, links = await page(links["previous"])
    assert back == ids[3:5]
    again, links = await page(links["previous"])
    assert again == ids[1:3]
    assert (await page(links["next"]))[0] == ids[3:5]
    assert (await page(links["first"]))[0] == ids[:2]
    assert (await page(links["last"]))[0] == ids[3:]


@pytest.mark.parametrize(("limit", "shown"), [("limit=300", 300), ("limit=301", 300), ("", 100)])
async def test_a_page_has_300_events_at_most_and_100_unless_told(
    rig: Rig, limit: str, shown: int
) -> None:
    events = tuple(event("accepted", "M1", number=number) for number in range(305))
    await rig.store.accept(new_message(queue_id="M1", events=events))
    _, page = await rig.ask("GET", f"/v3/example.com/events?{limit}")
    assert len(page["items"]) == shown


async def test_a_long_search_ends_in_short_pages_or_in_a_sentence(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.api.events._PATIENCE", timedelta(0))
    monkeypatch.setattr("relay.queue.sqlite.events._WINDOW", 2)
    ids = await sent(rig, 7)
    assert await walk(rig, "/v3/example.com/events?ascending=yes") == ids
    status, said = await rig.ask("GET", "/v3/example.com/events?subject=nothing")
    assert (status, set(said)) == (400, {"message"})


async def test_the_page_behind_the_end_has_what_comes_later(rig: Rig) -> None:
    await sent(rig, 1)
    _, page = await rig.ask("GET", "/v3/example.com/events?ascending=yes")
    following = page["paging"]["next"].partition(str(rig.http.port))[2]
    assert (await rig.ask("GET", following))[1]["items"] == []
    [later] = await sent(rig, 1)
    assert await walk(rig, following) == [later]


async def test_events_are_those_of_the_domain_and_of_what_is_asked(rig: Rig) -> None:
    [plain] = await sent(rig, 1, subject="Plain words")
    [tagged] = await sent(rig, 1, o_tag="news", to="carl@dest.example", o_testmode="yes")
    await rig.form(
        "/v3/other.example/messages",
        **{"from": "a@other.example", "to": "bob@dest.example", "text": "x"},
    )

    async def found(query: str) -> list[str]:
        _, said = await rig.ask("GET", f"/v3/example.com/events?ascending=yes&{query}")
        return [
            f"{one['event']} {one['message']['headers']['message-id']}" for one in said["items"]
        ]

    both = [f"accepted {plain}", f"accepted {tagged}", f"delivered {tagged}"]
    assert await found("") == both
    assert await found("event=accepted") == both[:2]
    assert await found("event=delivered+OR+failed") == both[2:]
    assert await found("event=opened") == []
    assert await found("recipient=carl@dest.example") == both[1:]
    assert await found("subject=plain") == both[:1]
    assert await found("tags=news&event=accepted") == both[1:2]
    assert await found(f"message-id=<{plain}>") == both[:1]
    assert await found("from=ANN") == both
    assert await found("severity=permanent") == []
    begin = int((NOW + timedelta(seconds=2)).timestamp())
    assert await found(f"begin={begin}") == both[1:]
    assert await found(f"end={begin - 1}") == both[:1]
    assert (
        await found("begin=Fri,+20+Nov+2026+12:00:02+%2B0000&end=Fri,+20+Nov+2026+12:00:02+-0000")
        == both[1:]
    )


@pytest.mark.parametrize(
    "query",
    [
        "ascending=perhaps",
        "limit=0",
        "limit=x",
        "begin=tomorrow",
        "page=%00",
        "page=x",
        "page=W1tdLDEyXQ",
        "page=bnVsbA",
        "event=deliverd",
        "event=NOT+deliverd",
        "event=delivered+OR+fialed",
        "event=",
        "recipient=",
        "recipient=+",
        "from=",
        "message-id=",
        "begin=",
    ],
)
async def test_invalid_query_is_refused(rig: Rig, query: str) -> None:
    assert (await rig.ask("GET", f"/v3/example.com/events?{query}"))[0] == 400


async def test_item_of_the_events_listing_is_the_object_of_the_delivery_log(rig: Rig) -> None:
    await sent(rig, 1, o_testmode="yes")
    _, said = await rig.ask("GET", "/v3/example.com/events?event=delivered")
    [stored] = [one for one in await rig.store.events_after(0) if one.event.name == "delivered"]
    [item] = said["items"]
    line = json.loads(stored.event.line)
    assert {name: value for name, value in item.items() if name in line} | {
        "flags": line["flags"]
    } == line
    assert item["flags"]["is-test-mode"] is True


# --- webhooks -------------------------------------------------------------------------------------


async def test_a_webhook_is_made_changed_and_removed(rig: Rig) -> None:
    hooks = "/v3/domains/example.com/webhooks"
    made = await rig.form(hooks, id="delivered", url=["https://a.example/x", "https://b.example"])
    urls = {"urls": ["https://a.example/x", "https://b.example"]}
    assert made == (200, {"message": "Webhook has been created", "webhook": urls})
    assert await rig.ask("GET", hooks) == (200, {"webhooks": {"delivered": urls}})
    assert await rig.ask("GET", f"{hooks}/delivered") == (200, {"webhook": urls})
    assert (await rig.form(hooks, id="delivered", url="https://a.example"))[0] == 400
    changed = await rig.form(f"{hooks}/delivered", "PUT", url="https://c.example")
    assert changed[1]["webhook"] == {"urls": ["https://c.example"]}
    assert (await rig.ask("DELETE", f"{hooks}/delivered"))[0] == 200
    assert (await rig.ask("GET", f"{hooks}/delivered"))[0] == 404
    assert await rig.ask("GET", hooks) == (200, {"webhooks": {}})


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "opened", "url": "https://a.example"},
        {"id": "delivered"},
        {"id": "delivered", "url": "ftp://a.example"},
        {"id": "delivered", "url": "https://"},
        {"id": "delivered", "url": "http://127.0.0.1/"},
        {"id": "delivered", "url": ["https://a.example/", "http://169.254.169.254/latest"]},
        {"id": "delivered", "url": "https://a.example:99999"},
        {"id": "delivered", "url": "https://a.example/\nX: y"},
        {"id": "delivered", "url": [f"https://a.example/{n}" for n in range(4)]},
        {"url": "https://a.example"},
    ],
)
async def test_a_webhook_that_could_not_be_called_is_refused(rig: Rig, fields: Any) -> None:
    assert (await rig.form("/v3/domains/example.com/webhooks", **fields))[0] == 400


async def test_without_a_signing_key_there_are_no_webhooks(rig: Rig) -> None:
    rig.options = HttpOptions(api_keys=(KEY,))
    path = "/v3/domains/example.com/webhooks"
    assert (await rig.form(path, id="delivered", url="https://a.example"))[0] == 400


# --- the operator ---------------------------------------------------------------------------------


async def test_operators_verbs_work_over_http(rig: Rig) -> None:
    ids = [one.rpartition("@")[0] for one in await sent(rig, 3)]
    _, page = await rig.ask("GET", "/relay/v1/queue?limit=2")
    assert [one["queue-id"] for one in page["items"]] == ids[:2]
    _, rest = await rig.ask("GET", f"/relay/v1/queue?limit=2&after={page['next']}")
    assert ([one["queue-id"] for one in rest["items"]], rest["next"]) == (ids[2:], None)
    held = await rig.ask("POST", "/relay/v1/queue/hold", json={"ids": [ids[0], "nobody"]})
    assert held == (200, {"changed": 1, "unknown": ["nobody"]})
    _, page = await rig.ask("GET", "/relay/v1/queue?state=held")
    assert [one["queue-id"] for one in page["items"]] == ids[:1]
    assert (await rig.ask("POST", "/relay/v1/queue/remove", json={"all": True}))[1]["changed"] == 3
    assert (await rig.ask("GET", f"/relay/v1/queue/{ids[0]}"))[0] == 404
    _, said = await rig.ask("GET", "/relay/v1/status")
    assert said["queue"] == {"queued": 0, "deferred": 0, "held": 0}


async def test_a_message_is_shown_with_where_its_settings_came_from(rig: Rig) -> None:
    [sent_id] = await sent(rig, 1, o_require_tls="yes")
    _, said = await rig.ask("GET", f"/relay/v1/queue/{sent_id.rpartition('@')[0]}")
    assert said["settings"][0]["require-tls-source"] == "message"
    assert "Received: from unknown" in said["header"]


@pytest.mark.parametrize(
    ("verb", "more", "status"),
    [
        ("hold", {"json": {}}, 400),
        ("hold", {"json": {"ids": "x"}}, 400),
        ("hold", {"json": {"state": "dead"}}, 400),
        ("hold", {"json": {"state": {}}}, 400),
        ("hold", {"json": {"older-than": 1e308}}, 400),
        ("hold", {"json": []}, 400),
        ("remove", {"json": {"domain": "dest.example", "sender": ""}}, 400),
        ("remove", {"json": {"domain": "dest.example", "ids": []}}, 400),
        ("remove", {"json": {"domain": "dest.example", "sendr": "a@b.example"}}, 400),
        ("remove", {"json": {"domain": "dest.example", "state": None}}, 400),
        ("remove", {"json": {"all": True, "sender": "a@b.example"}}, 400),
        ("remove", {"json": {"sender": "\ud800"}}, 400),
        ("remove", {"json": {"ids": ["\ud800"]}}, 400),
        ("hold", {"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ("hold", {"data": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400),
        ("hold", {"data": b"{}"}, 415),
        ("burn", {"json": {"all": True}}, 404),
    ],
)
async def test_invalid_request_for_a_verb_is_refused(
    rig: Rig, verb: str, more: Any, status: int
) -> None:
    assert (await rig.ask("POST", f"/relay/v1/queue/{verb}", **more))[0] == status


@pytest.mark.parametrize(
    "query",
    [
        "sender=",
        "domain=",
        "state=",
        "older-than=",
        "limit=",
        "sendr=a@b.example",
        "domain=a.example&domain=b.example",
    ],
)
async def test_a_filter_of_the_queue_that_says_nothing_is_refused(rig: Rig, query: str) -> None:
    assert (await rig.ask("GET", f"/relay/v1/queue?{query}"))[0] == 400


async def test_explain_says_over_http_what_it_says_on_the_command_line(rig: Rig) -> None:
    await rig.form("/v3/domains/example.com/connection", "PUT", skip_verification="yes")
    query = "from=a@example.com&to=b@dest.example&require-tls=yes"
    status, said = await rig.ask("GET", f"/relay/v1/explain?{query}")
    assert status == 200
    assert said["policy"]["require-tls"]["source"] == "message"
    assert said["policy"]["skip-verification"] == {
        "value": True,
        "source": "api",
        "rule": "example.com",
    }
    assert said["hosts"][0]["host"] == "mx.dest.example"
    for wrong in ("", "to=x", "to=a@b.example&require-tls=perhaps", "to=a@b.example&from=%00"):
        assert (await rig.ask("GET", f"/relay/v1/explain?{wrong}"))[0] == 400


@pytest.mark.parametrize(
    "path", ["/", "/v3", "/v3/example.com/bounces", "/relay/v1/nothing", "/%00", "/..%2f.."]
)
async def test_unknown_path_is_404_in_json(rig: Rig, path: str) -> None:
    status, said = await rig.ask("GET", path)
    assert (status, set(said)) == (404, {"message"})


async def test_another_method_is_405_and_says_which_there_are(rig: Rig) -> None:
    async with rig.http.delete("/v3/domains/example.com/connection") as response:
        assert response.status == 405
        assert set(response.headers["Allow"].replace(" ", "").split(",")) >= {"GET", "PUT"}


async def test_simultaneous_requests_do_not_mix(rig: Rig) -> None:
    answers = await asyncio.gather(
        *(rig.send(to=f"r{n}@dest{n}.example", text=f"text {n}") for n in range(40))
    )
    assert {status for status, _ in answers} == {200}
    entries = {entry.recipients[0].address: entry for entry in await rig.claimed()}
    assert len(entries) == 40
    for n in range(40):
        assert f"text {n}\r\n".encode() in await rig.content(entries[f"r{n}@dest{n}.example"])


async def test_a_client_that_hangs_up_leaves_nothing_half_done(rig: Rig) -> None:
    _, writer = await asyncio.open_connection(rig.http.host, rig.http.port)
    body = b"from=ann@example.com&to=bob@dest.example&text=hello"
    head = (
        "POST /v3/example.com/messages HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: {auth(KEY)['Authorization']}"
    )
    head += (
        "\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    writer.transport.abort()
    async with asyncio.timeout(patient(10)):
        while not (claimed := await rig.claimed()):
            await asyncio.sleep(0.01)
    assert len(claimed) == 1, "what was read whole is taken, as over SMTP"
