"""Bodies over HTTP: judged after the key, bounded in size, time and memory, read piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import io
import json
import random
import weakref
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from relay.api import bodies, rate, server, start_http
from relay.api.bodies import BodyBuffers
from relay.api.formparser import FIELDS_OCTETS, parser_for
from relay.api.mailgun_form import ApiError, Form
from tests.fakes.http import KEY, Rig, auth
from tests.fakes.waiting import patient

SEND = "/v3/example.com/messages"
URLENCODED = "application/x-www-form-urlencoded"
MAIL = b"from=ann@example.com&to=bob@dest.example&text=hello"


class Raw:
    """A client that says what it likes, octet by octet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, octets: bytes) -> None:
        self.writer.write(octets)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self, seconds: float = 10.0) -> tuple[int, str]:
        async with asyncio.timeout(seconds):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length:")[2].partition("\r\n")[0] or 0)
            return int(head.split()[1]), (await self.reader.readexactly(length)).decode()

    async def status(self, seconds: float = 10.0) -> int:
        return (await self.answer(seconds))[0]


Dial = Callable[..., Any]


@pytest.fixture
async def dial(rig: Rig) -> AsyncIterator[Dial]:
    """Connections to the relay's own server, from an address of the caller's choice."""
    listening = await start_http(rig.api, ("127.0.0.1", 0))
    made: list[Raw] = []

    async def dialled(source: str = "127.0.0.1") -> Raw:
        made.append(Raw(*await asyncio.open_connection(*listening.address, local_addr=(source, 0))))
        return made[-1]

    yield dialled
    for one in made:
        one.writer.transport.abort()
    await listening.close()


def head(
    *fields: str,
    path: str = SEND,
    method: str = "POST",
    key: str | None = KEY,
    kind: str = URLENCODED,
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: relay.example", f"Content-Type: {kind}", *fields]
    if key is not None:
        lines.append(f"Authorization: {auth(key)['Authorization']}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# --- the key comes first --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "identity", "gzip, gzip", "klingon"]
)
async def test_an_encoded_body_is_401_without_a_key_and_415_with_one(
    dial: Dial, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    inflated: list[Any] = []
    monkeypatch.setattr(zlib, "decompressobj", lambda *a, **k: inflated.append(a))
    body = gzip.compress(random.Random(1).randbytes(600_000))
    for key, status in ((None, 401), ("wrong", 401), (KEY, 415)):
        client = await dial()
        fields = (f"Content-Encoding: {encoding}", f"Content-Length: {len(body)}")
        await client.say(head(*fields, key=key) + body)
        assert await client.status() == status
    assert inflated == []


@pytest.mark.parametrize("coding", ["gzip, chunked", "chunked, chunked", "deflate"])
async def test_a_transfer_coding_besides_chunked_is_refused(
    dial: Dial, rig: Rig, coding: str
) -> None:
    for key, status in ((None, 401), (KEY, 415)):
        client = await dial()
        await client.say(head(f"Transfer-Encoding: {coding}", key=key) + b"0\r\n\r\n")
        assert await client.status() in (status, 400)
    assert await rig.claimed() == []


@pytest.mark.parametrize("path", ["/", "/v3/nothing", "/relay/v1/status", "/healthz", "/metrics"])
async def test_no_path_inflates_a_body(
    dial: Dial, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    inflated: list[Any] = []
    monkeypatch.setattr(zlib, "decompressobj", lambda *a, **k: inflated.append(a))
    body = gzip.compress(b"x" * 1_000_000)
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        client = await dial()
        fields = ("Content-Encoding: gzip", f"Content-Length: {len(body)}")
        await client.say(head(*fields, path=path, method=method, key=None) + body)
        assert await client.status() in (200 if path == "/healthz" else 401, 401, 404, 405)
    assert inflated == []


async def test_client_that_expects_100_continue_gets_it_only_with_a_right_key(
    dial: Dial, rig: Rig
) -> None:
    fields = ("Expect: 100-continue", f"Content-Length: {len(MAIL)}")
    client = await dial()
    await client.say(head(*fields, key="wrong"))
    assert await client.status() == 401, "no 100 Continue before it"
    client = await dial()
    await client.say(head(*fields))
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.say(MAIL)
    assert await client.status() == 200
    assert len(await rig.claimed()) == 1


async def test_a_client_that_sends_a_whole_upload_before_it_reads_still_reads_its_answer(
    dial: Dial,
) -> None:
    for key, status in ((None, 401), (KEY, 413)):
        client = await dial()
        body = b"text=" + b"x" * (9 * 1024 * 1024)
        await client.say(head(f"Content-Length: {len(body)}", key=key) + body)
        assert await client.status() == status


# --- pace and room --------------------------------------------------------------------------------


async def test_uploads_that_stop_are_cut_and_hold_up_nobody(
    dial: Dial, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "_BEGIN_SECONDS", 1.0)
    stalled = [await dial() for _ in range(8)]
    for client in stalled[:4]:
        await client.say(head("Transfer-Encoding: chunked") + b"1\r\nf\r\n")
    for client in stalled[4:]:
        await client.say(head("Content-Length: 5000000") + b"f")
    assert (await rig.send(attachment=b"x" * 600_000))[0] == 200
    good = await dial()
    await good.say(head(f"Content-Length: {len(MAIL)}") + MAIL)
    assert await good.status() == 200
    for client in stalled:
        assert await client.answer() == (408, '{"message": "The request took too long to come"}')


async def test_a_body_that_keeps_a_pace_may_take_its_time_and_a_slower_one_is_cut(
    dial: Dial, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "_BEGIN_SECONDS", 0.5)
    monkeypatch.setattr(bodies, "_OCTETS_A_SECOND", 1000)
    body = MAIL + b"x" * (2000 - len(MAIL))
    keeping, slow = await dial(), await dial()
    for client in (keeping, slow):
        await client.say(head(f"Content-Length: {len(body)}"))

    async def send(client: Raw, octets: int) -> None:
        for start in range(0, len(body), octets):
            await client.say(body[start : start + octets])
            await asyncio.sleep(0.1)

    sending = asyncio.gather(send(keeping, 200), send(slow, 20))
    assert await keeping.status() == 200
    assert await slow.status() == 408
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert len(await rig.claimed()) == 1


async def test_large_bodies_wait_for_their_clients_own_share_and_small_ones_do_not(
    dial: Dial, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 MiB is the largest of this relay: three in all, one and a half of one address or key."""
    monkeypatch.setattr(bodies, "_WAIT_SECONDS", 0.5)
    multipart = "multipart/form-data; boundary=x"
    first, second = await dial("127.0.0.2"), await dial("127.0.0.2")
    for client in (first, second):
        await client.say(head("Content-Length: 5000000", kind=multipart) + b"--x\r\n")
    assert await second.answer() == (
        503,
        '{"message": "Too many large requests at a time, try again later"}',
    ), "the same address and key"
    other = await dial("127.0.0.3")
    await other.say(head("Content-Length: 5000000", kind=multipart) + b"--x\r\n")
    assert await other.status() == 503, "the same key"
    good = await dial("127.0.0.2")
    await good.say(head(f"Content-Length: {len(MAIL)}") + MAIL)
    assert await good.status() == 200
    first.writer.transport.abort()
    async with asyncio.timeout(patient(10)):  # the room is given back
        while (await rig.send(attachment=b"x" * 3_000_000))[0] != 200:
            await asyncio.sleep(0.05)


async def test_memory_for_bodies_is_granted_in_turn_and_within_each_clients_share() -> None:
    room = BodyBuffers(300, 150)
    await room.reserve(100, ["a", "key"])
    waiting = asyncio.create_task(room.reserve(100, ["a", "other"]))
    await asyncio.sleep(0)
    await room.reserve(100, ["b", "other"])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await room.reserve(100, ["c", "key"])
    room.give_back(100, ["a", "key"])
    await asyncio.sleep(0)
    assert not waiting.done(), "`other` has its share"
    room.give_back(100, ["b", "other"])
    await asyncio.wait_for(waiting, patient(1))
    room.give_back(100, ["a", "other"])
    await room.reserve(150, ["a", "key"])


@pytest.mark.timeout(400)  # tracemalloc makes it slow
async def test_four_large_urlencoded_bodies_cost_their_size_and_not_nine_times_as_much(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    monkeypatch.setattr(bodies, "_WAIT_SECONDS", 60.0)  # none is turned away, however slow we are
    body = b"from=ann@example.com&to=bob@dest.example&text=" + b"%41+" * 1_000_000
    tracemalloc.start()
    answers = await asyncio.gather(
        *(
            rig.ask("POST", SEND, data=io.BytesIO(body), headers={"Content-Type": URLENCODED})
            for _ in range(4)
        )
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {status for status, _ in answers} == {200}
    assert peak < 12 * len(body), "four of them, and this test's client holds them, too"
    large = await rig.ask(
        "POST",
        SEND,
        data=io.BytesIO(b"text=" + b"x" * (9 * 1024 * 1024 - 5)),
        headers={"Content-Type": URLENCODED},
    )
    assert large[0] == 413


# --- what HTTP has besides ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "octets",
    [
        head("Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n",
        head("Transfer-Encoding: identity") + MAIL,
        head("Content-Length: 3", "Content-Length: 4") + b"abc",
        head("Content-Length: +3") + b"abc",
        head("Content-Length: -1") + b"abc",
        head("Transfer-Encoding: chunked") + b"xyz\r\n",
        head("Transfer-Encoding: chunked") + b"fffffffffffffffffffff\r\n",
        head("X: " + "x" * 10_000) + b"",
        head(*(f"X-{n}: y" for n in range(200))) + b"",
        b"GET /?" + b"x" * 1024 * 1024 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET " + b"/x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)  # fmt: skip
async def test_malformed_request_is_400_and_ends_the_connection(
    dial: Dial, rig: Rig, octets: bytes
) -> None:
    client = await dial()
    await client.say(octets)
    with contextlib.suppress(ConnectionError):
        assert (await client.answer())[0] in (400, 401)
        assert await client.reader.read() == b""
    assert await rig.claimed() == []
    assert (await rig.send())[0] == 200


async def test_a_client_that_sends_requests_and_reads_no_answers_is_not_read_on(dial: Dial) -> None:
    client = await dial()
    sent = 0
    request = b"GET /relay/v1/openapi.json HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 4000 + b"\r\n\r\n"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            while sent < 64 * 1024 * 1024:
                client.writer.write(request * 16)
                sent += 16 * len(request)
                await client.writer.drain()
    # What the kernel's buffers of both ends hold, and one read of the server's.
    assert sent < 16 * 1024 * 1024


async def test_answer_that_its_client_does_not_read_ends_the_connection(
    dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "_WAIT_SECONDS", 0)
    monkeypatch.setattr(server, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(server, "_ANSWER_OCTETS_A_SECOND", 10_000_000)
    client = await dial()
    client.writer.write(b"GET /relay/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
    await asyncio.sleep(3)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(patient(60)):
            while await client.reader.read(1 << 20):
                pass


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PATCH"])
async def test_other_methods_are_answered_without_their_body(dial: Dial, method: str) -> None:
    client = await dial()
    await client.say(
        head("Content-Length: 1000000", method=method, path="/relay/v1/status", key=None)
    )
    status = int((await client.reader.readuntil(b"\r\n\r\n")).split()[1])
    assert status in (400, 401, 405)


async def test_clients_without_a_key_are_answered_at_a_rate_and_others_at_once(
    dial: Dial, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "_WAIT_SECONDS", 6.0)

    async def ask(key: str | None, source: str) -> float:
        client = await dial(source)
        begun = asyncio.get_running_loop().time()
        await client.say(head("Content-Length: 0", path="/relay/v1/status", method="GET", key=key))
        assert await client.status() == (200 if key else 401)
        return asyncio.get_running_loop().time() - begun

    flood = asyncio.gather(*(ask(None, "127.0.0.5") for _ in range(60)))
    good = [await ask(KEY, "127.0.0.5") for _ in range(10)]
    stranger = await ask(None, "127.0.0.6")
    waits = sorted(await flood)
    assert max(good) < 5
    assert stranger < 5
    assert waits[0] < 5
    assert waits[-1] > 5.9


async def test_simultaneous_health_requests_share_one_check(
    dial: Dial, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def health() -> dict[str, list[str]]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.2)
        return {"liveness": [], "readiness": ["draining"]}

    monkeypatch.setattr(rig.relay, "health", health)
    listening = await start_http(rig.api, ("127.0.0.1", 0))

    async def ask(path: str) -> int:
        reader, writer = await asyncio.open_connection(*listening.address)
        writer.write(head(path=path, method="GET", key=None))
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        writer.transport.abort()
        return status

    assert set(await asyncio.gather(*(ask("/healthz") for _ in range(30)))) == {200}
    assert set(await asyncio.gather(*(ask("/readyz") for _ in range(30)))) == {503}
    assert asked <= 4
    await listening.close()


# --- forms, octet by octet ------------------------------------------------------------------------


def parse(kind: str, body: bytes, step: int = 1 << 20) -> Form:
    parser = parser_for(kind)
    assert parser is not None
    for start in range(0, len(body), step):
        parser.feed(body[start : start + step])
    return parser.end()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"", ()),
        (b"a=1&b=2", (("a", "1"), ("b", "2"))),
        (b"&&a=1&", (("a", "1"),)),
        (b"a&b=&=c", (("a", ""), ("b", ""), ("", "c"))),
        (b"a=b=c&a=d", (("a", "b=c"), ("a", "d"))),
        (b"o%3Atag=x+y%20z&t=%E2%82%AC%26%3D", (("o:tag", "x y z"), ("t", "€&="))),
        (b"a=%&b=%4&c=%zz&d=%%41", (("a", "%"), ("b", "%4"), ("c", "%zz"), ("d", "%A"))),
        ("a=ü".encode(), (("a", "ü"),)),
    ],
)
def test_an_urlencoded_form_is_read_the_same_however_it_comes(
    body: bytes, fields: tuple[tuple[str, str], ...], step: int
) -> None:
    assert parse(URLENCODED, body, step).fields == fields


MULTIPART = "multipart/form-data; boundary=x"
PARTS = (
    b'--x\r\nContent-Disposition: form-data; name="from"\r\n\r\nann\r\n'
    b'--x\r\nContent-Disposition: form-data; name="text"\r\n'
    b"Content-Type: text/plain; charset=ISO-8859-1\r\n\r\n\xfc--x\r\n\r\n"
    b'--x\r\nContent-Disposition: form-data; name="attachment"; filename="my logo (1).png"\r\n'
    b"Content-Type: text/calendar; method=REQUEST\r\n\r\n\0\r\n--y\r\n"
    b"--x\r\nContent-Disposition: form-data; name=inline; filename*=UTF-8''%C3%BC%20x.txt\r\n"
    b"Content-Transfer-Encoding: base64\r\n\r\naGVsbG8=\r\n--x--\r\nepilogue"
)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_form_that_is_no_longer_needed_holds_no_memory_until_the_collector_runs(
    is_whole: bool,
) -> None:
    parser = parser_for(MULTIPART)
    assert parser is not None
    parser.feed(PARTS if is_whole else PARTS[:-100])
    if is_whole:
        parser.end()
    gone = weakref.ref(parser)
    gc.disable()
    try:
        del parser
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_multipart_form_is_read_the_same_however_it_comes(step: int) -> None:
    form = parse(MULTIPART, PARTS, step)
    assert form.fields == (("from", "ann"), ("text", "ü--x\r\n"))
    calendar, inline = form.files
    assert (calendar.filename, calendar.content_type) == (
        "my logo (1).png",
        "text/calendar; method=REQUEST",
    )
    assert calendar.content == b"\0\r\n--y"
    assert (inline.name, inline.filename, inline.content) == ("inline", "ü x.txt", b"hello")


def _part(header: bytes, content: bytes = b"x") -> bytes:
    return b"--x\r\n" + header + b"\r\n\r\n" + content + b"\r\n"


_NAMED = b'Content-Disposition: form-data; name="a"'


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        (URLENCODED, b"a=1&" * 20_000, 400),
        (URLENCODED, b"a=%ff", 400),
        (URLENCODED, b"a=" + b"x" * (FIELDS_OCTETS + 1), 413),
        (URLENCODED, b"x" * (FIELDS_OCTETS + 1), 413),
        (MULTIPART, _part(_NAMED) * 11_000 + b"--x--", 400),
        (MULTIPART, _part(_NAMED, b"x" * 100_000) * 90 + b"--x--", 413),
        (MULTIPART, _part(_NAMED + b"\r\n" + b"X: " + b"x" * 5000) + b"--x--", 400),
        (MULTIPART, _part(_NAMED + b"\r\nX: y" * 20) + b"--x--", 400),
        (MULTIPART, _part(_NAMED + b"\r\nContent-Type: text/plain; charset=zlib") + b"--x--", 400),
        (MULTIPART, _part(_NAMED + b"\r\nContent-Transfer-Encoding: zlib") + b"--x--", 400),
        (MULTIPART, b"\n" * 1_000_000, 400),
        (MULTIPART, _part(b"X: y") + b"--x--", 400),
        (MULTIPART, _part(_NAMED), 400),
        ("multipart/form-data", b"--x--", 400),
        ('multipart/form-data; boundary=""', b"--x--", 400),
    ],
)  # fmt: skip
def test_a_form_that_would_cost_much_or_is_none_is_refused(
    kind: str, body: bytes, status: int
) -> None:
    with pytest.raises(ApiError) as refused:
        parse(kind, body, 32 * 1024)
    assert refused.value.status == status


async def test_a_json_body_is_as_bounded_as_a_form(rig: Rig) -> None:
    path, kind = "/relay/v1/queue/hold", {"Content-Type": "application/json"}
    for body, status in (
        (b'{"ids":["' + b"x" * (1024 * 1024) + b'"]}', 413),
        (b"[" * 500_000, 400),
        (b'{"a":' * 100_000, 400),
        (json.dumps({"ids": ["x"] * 10_000}).encode(), 200),
    ):
        assert (await rig.ask("POST", path, data=io.BytesIO(body), headers=kind))[0] == status
