"""Some hundred messages that others wrote, through the relay by every door, and what the mail host
got.

What arrives is what was sent, octet for octet, but for what `arrival` says.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import re
import shutil
import smtplib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import dkim
import pytest

from relay.mail.section import HeaderSection, Sections, lines_like_fields
from relay.sandbox.mx import MxServer
from relay.sign.keys import dns_record, load_key, new_key
from tests.fakes.waiting import patient
from tests.rigs.corpus import Letter, corpus
from tests.rigs.ports import free_port
from tests.rigs.sandbox import Sandbox

pytestmark = pytest.mark.timeout(600)  # the corpus has to be fetched once

CLIENTS = Path(__file__).resolve().parents[1] / "clients"
KEY = "a-long-random-key"
SENDER = "writer@corpus.example"

REASONS: dict[str, dict[str, Callable[[bytes], bool]]] = {
    "DATA": {"550 5.6.0": lambda raw: b"\0" in raw},
    "BDAT": {"550 5.6.0": lambda raw: b"\0" in raw},
    "HTTP": {
        "the message has a NUL character": lambda raw: b"\0" in raw,
        "the message has a bare CR or LF": lambda raw: (
            b"\r" in raw and re.search(rb"\r(?!\n)|(?<!\r)\n", raw) is not None
        ),
    },
}
"""By door, what a refusal says and when it is right; nothing else may be refused."""

_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")
_ADDED = re.compile(rb"(?:(?:Date|Message-ID|From): [^\r\n]+\r\n)*")
_RECEIVED = re.compile(rb"Received: from [^\r\n]+\r\n(?:\t[^\r\n]+\r\n)+")


def arrival(sent: bytes) -> bytes:
    """What follows our Received field and the fields a message lacks.

    The `From ` line of a mailbox file becomes a field; where a line that is no field ends the
    header section, an empty line is put before it.
    """
    if re.match(rb">*From (?![ \t]*:)", sent):
        sent = b"X-Mailbox-Line: " + sent
    at = 0
    for line in sent.splitlines(keepends=True) if b"\r\n" in sent else []:
        if not (_FIELD.match(line) or (at and line[:1] in b" \t")):
            return sent if line == b"\r\n" else sent[:at] + b"\r\n" + sent[at:]
        at += len(line)
    return sent


def without_bcc(sent: bytes) -> bytes:
    """Over HTTP the recipients of a blind copy are taken out."""
    header, empty, body = sent.partition(b"\r\n\r\n")
    return re.sub(rb"(?im)^bcc[ \t]*:[^\n]*\n(?:[ \t][^\n]*\n)*", b"", header + b"\r\n") + (
        empty[2:] + body
    )


@dataclass
class Relayed:
    """What became of each letter at each door: what the client heard, or what the mail host got."""

    heard: dict[tuple[str, str], str] = field(default_factory=dict)
    got: dict[tuple[str, str], bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Doors:
    """A relay with a mail host behind it."""

    sandbox: Sandbox
    mx: MxServer
    smtp: int
    http: int

    async def pass_on(self, letters: tuple[Letter, ...], *doors: str) -> Relayed:
        """Give each letter to the relay at each door, and wait for what arrives."""
        done = Relayed()
        jobs = [
            asyncio.to_thread(self._by_smtp, letters, door, done)
            for door in doors
            if door != "HTTP"
        ]
        await asyncio.gather(*jobs, *([self._by_http(letters, done)] if "HTTP" in doors else []))
        names = {
            f"{n}.{door}".lower(): (letter.name, door)
            for n, letter in enumerate(letters)
            for door in doors
        }
        wanted = len(letters) * len(doors) - len(done.heard)
        async with asyncio.timeout(patient(60)):
            while len(self.mx.messages) < wanted:
                await asyncio.sleep(0.1)
        for message in self.mx.messages:
            local = message.recipients[0].partition("<")[2].partition("@")[0]
            done.got[names[local.lower()]] = message.content
        return done

    def _by_smtp(self, letters: tuple[Letter, ...], door: str, done: Relayed) -> None:
        with smtplib.SMTP("127.0.0.1", self.smtp, timeout=patient(30)) as client:
            client.ehlo("client.example")
            for number, letter in enumerate(letters):
                client.mail(SENDER, ["BODY=8BITMIME"])
                client.rcpt(f"{number}.{door}@corpus.example")
                code, text = (_bdat if door == "BDAT" else smtplib.SMTP.data)(client, letter.sent)
                if code != 250:
                    done.heard[letter.name, door] = f"{code} {text.decode()}"
                    client.rset()

    async def _by_http(self, letters: tuple[Letter, ...], done: Relayed) -> None:
        url = f"http://127.0.0.1:{self.http}/v3/corpus.example/messages.mime"
        auth = aiohttp.encode_basic_auth("api", KEY)
        async with aiohttp.ClientSession(headers={"Authorization": auth}) as client:
            for number, letter in enumerate(letters):
                form = aiohttp.FormData()
                form.add_field("to", f"{number}.http@corpus.example")
                form.add_field("message", io.BytesIO(letter.raw), filename="message.eml")
                async with client.post(url, data=form) as answer:
                    said = await answer.json()
                    if answer.status != 200:
                        done.heard[letter.name, "HTTP"] = said["message"]


def _bdat(client: smtplib.SMTP, content: bytes) -> tuple[int, bytes]:
    """RFC 3030, in two chunks."""
    half = len(content) // 2
    client.send(b"BDAT %d\r\n%b" % (half, content[:half]))
    code, text = client.getreply()
    client.send(b"BDAT %d LAST\r\n%b" % (len(content) - half, content[half:]))
    last = client.getreply()
    return last if code == 250 else (code, text)


@pytest.fixture
async def doors(sandbox: Sandbox) -> Doors:
    mx = await sandbox.domain("corpus.example")
    http = free_port()
    relay = await sandbox.start(admin={"http": f"127.0.0.1:{http}", "api_keys": [KEY]})
    return Doors(sandbox, mx, relay.port, http)


async def test_mail_that_others_wrote_arrives_as_it_was_sent(doors: Doors) -> None:
    letters = await asyncio.to_thread(corpus)
    assert len(letters) > 190  # without those of Python, which Debian leaves out
    done = await doors.pass_on(letters, "DATA", "BDAT", "HTTP")
    wrong = [
        (letter.name, door, reason)
        for letter in letters
        for door in REASONS
        if (reason := fault(letter, door, done))
    ]
    assert not wrong
    assert len(done.heard) < len(letters) // 10


def fault(letter: Letter, door: str, done: Relayed) -> str:
    """What is wrong with what became of a letter; "" where nothing is."""
    raw = letter.raw if door == "HTTP" else letter.sent
    right = [says for says, holds in REASONS[door].items() if holds(raw)]
    heard = done.heard.get((letter.name, door))
    if heard is not None:
        return "" if any(says in heard for says in right) else f"refused: {heard}"
    if right:
        return f"taken, though {right[0]}"
    got, wanted = done.got[letter.name, door], arrival(letter.sent)
    wanted = without_bcc(wanted) if door == "HTTP" else wanted
    received = _RECEIVED.match(got)
    if received is None:
        return f"no Received field: {got[:60]!r}"
    below = got[received.end() :]
    if not below.endswith(wanted):
        return f"changed: {below[:300]!r}"
    added = below.removesuffix(wanted)
    return "" if _ADDED.fullmatch(added) else f"added: {added!r}"


GOOD = (
    b"From: a@corpus.example\r\nDate: Fri, 20 Nov 2026 12:00:00 +0000\r\n"
    b"Message-ID: <a@b.example>\r\n"
)
TEXT = b"\r\n\r\ntext\r\n"
BEGUN_BADLY = {
    "mailbox line": (
        b"From a@b Fri Nov 20 12:00:00 2026\r\n" + GOOD + b"X-Require-TLS: no" + TEXT,
        "",
    ),
    "quoted mailbox line": (b">From a@b\r\n" + GOOD + b"Subject: x" + TEXT, ""),
    "asks behind garbage": (b"garbage\r\n" + GOOD + b"X-Require-TLS: yes" + TEXT, "X-Require-TLS"),
    "asks behind a blank": (b" \r\n" + GOOD + b"X-Require-TLS: yes" + TEXT, "X-Require-TLS"),
    "asks behind a BOM": (b"\xef\xbb\xbf" + GOOD + b"X-Require-TLS: yes" + TEXT, "X-Require-TLS"),
    "asks in the text": (GOOD + b"text\r\nX-Skip-Verification: no" + TEXT, "X-Skip-Verification"),
    "weakens in the text": (GOOD + b"text\r\nX-Require-TLS: no" + TEXT, ""),
    "garbage only": (b"garbage\r\n" + TEXT, ""),
    "space before the colon": (GOOD + b"X-Require-TLS : yes" + TEXT, "X-Require-TLS"),
    "underscores": (GOOD + b"X_Require_TLS: yes" + TEXT, "X_Require_TLS"),
    "Cyrillic letter": (
        GOOD + "X-Rеquire-TLS: yes".encode() + TEXT,
        "write X-Require-TLS in ASCII",
    ),
    "no width": (GOOD + "X-Require\u200b-TLS: yes".encode() + TEXT, "write X-Require-TLS in ASCII"),
    "cut by a line end": (GOOD + b"X-\r\n Require-TLS: yes" + TEXT, "write X-Require-TLS in ASCII"),
    "many dashes": (GOOD + b"X-Require------TLS: yes" + TEXT, "write its name X-Require-TLS"),
    "behind an empty line": (b"\r\n" + GOOD + b"X-Require-TLS: yes" + TEXT, "X-Require-TLS"),
    "behind an empty line, UTF-8": ("\r\nПривет,\r\n\r\nX-Require-TLS: yes".encode() + TEXT, ""),
    "UTF-8 subject": (GOOD + "Subject: Grüße, X-Rеquire-TLS: yes".encode() + TEXT, ""),
    "no word for yes": (GOOD + b"X-Require-TLS: perhaps" + TEXT, "X-Require-TLS"),
    "a contradiction": (GOOD + b"X-Require-TLS: yes\r\nX-Require-TLS: no" + TEXT, "X-Require-TLS"),
    "no body": (GOOD, ""),
    "too many hops": (b"Received: x\r\n" * 100 + GOOD + TEXT, "Too many hops"),
}
"""Content, and what every door says that refuses it; "" where every door takes it."""


async def test_content_that_begins_badly_is_treated_alike_over_smtp_and_http(doors: Doors) -> None:
    letters = tuple(Letter(name, content) for name, (content, _) in BEGUN_BADLY.items())
    done = await doors.pass_on(letters, *REASONS)
    for letter in letters:
        said = BEGUN_BADLY[letter.name][1]
        for door in REASONS:
            heard = done.heard.get((letter.name, door))
            assert (heard is not None, said in (heard or "")) == (bool(said), True), (
                door,
                letter,
                heard,
            )
            if heard is None:
                obeyed = b"X-Require-TLS: no\r\n" if letter.name == "mailbox line" else b""
                wanted = arrival(letter.sent.replace(obeyed, b"") if obeyed else letter.sent)
                assert done.got[letter.name, door].endswith(wanted), (door, letter)


def test_no_line_of_mail_that_others_wrote_is_taken_for_a_policy_field():
    for letter in corpus():
        assert not list(lines_like_fields(letter.sent)), letter.name
        header, _, behind = Sections.of(letter.sent)
        assert not HeaderSection(header).asking, letter.name
        assert not list(lines_like_fields(behind)), letter.name


# --- signatures -----------------------------------------------------------------------------------


@functools.cache
def mailauth() -> Path:
    """The verifier of Node.js, installed once a run."""
    directory = Path(tempfile.mkdtemp(prefix="mailauth-"))
    shutil.copytree(CLIENTS / "mailauth", directory, dirs_exist_ok=True)
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=patient(150), check=False
    )
    if done.returncode and os.environ.get("RELAY_REQUIRE_TOOLS") != "1":
        pytest.skip(f"mailauth could not be installed: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return directory


def verdicts(
    contents: dict[str, bytes], key_record: str, directory: Path
) -> dict[str, tuple[bool, str]]:
    """What dkimpy and mailauth say of each content."""
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    command = ["node", "verify.mjs", str(directory), key_record]
    done = subprocess.run(
        command, cwd=mailauth(), capture_output=True, text=True, timeout=60, check=True
    )
    said: dict[str, str] = json.loads(done.stdout)
    return {
        name: (_by_dkimpy(content, key_record), said[name]) for name, content in contents.items()
    }


def _by_dkimpy(content: bytes, key_record: str) -> bool:
    try:
        return bool(dkim.verify(content, dnsfunc=lambda name, timeout=5: key_record.encode()))
    except (dkim.DKIMException, ValueError):
        return False


def signed(letters: tuple[Letter, ...], key: Path) -> Iterator[Letter]:
    """Letters with a signature of their author's, made before the relay sees them."""
    for letter in letters:
        content = arrival(letter.sent)
        header = content.partition(b"\r\n\r\n")[0]
        if len(re.findall(rb"(?im)^from[ \t]*:", header)) != 1 or b"\0" in content:
            continue
        yield Letter(
            letter.name,
            dkim.sign(
                content,
                b"s1",
                b"corpus.example",
                key.read_bytes(),
                include_headers=[b"from", b"to", b"subject"],
            )
            + content,
        )


@pytest.mark.needs("node", "npm")
async def test_dkim_signature_made_before_verifies_at_the_mail_host(
    doors: Doors, tmp_path: Path
) -> None:
    await asyncio.to_thread(mailauth)
    key = tmp_path / "key.pem"
    new_key(key, kind="rsa")
    zone = dns_record(load_key(key), domain="corpus.example", selector="s1")
    key_record = "".join(zone.split('"')[1::2])
    letters = tuple(signed((await asyncio.to_thread(corpus))[::3], key))
    done = await doors.pass_on(letters, "DATA", "HTTP")
    contents = {
        f"{number}.{door}": done.got[letter.name, door]
        for number, letter in enumerate(letters)
        for door in ("DATA", "HTTP")
        if (letter.name, door) in done.got
    }
    before = {str(number): letter.sent for number, letter in enumerate(letters)}
    told = await asyncio.to_thread(verdicts, before, key_record, tmp_path / "before")
    found = await asyncio.to_thread(verdicts, contents, key_record, tmp_path / "after")
    changed = {name: (told[name.partition(".")[0]], verdict) for name, verdict in found.items()}
    assert not {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    good = [verdict for verdict in found.values() if verdict == (True, "pass")]
    assert len(good) > 100
    assert len(good) > 0.9 * len(found)
