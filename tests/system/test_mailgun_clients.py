"""Mailgun's own clients against the relay, with only the base URL changed.

What the page for those who move says is run as it stands there: docs/moving-from-mailgun.md.
"""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mailgun.client import Client

from relay.sandbox.mx import MxServer
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port
from tests.rigs.sandbox import Sandbox

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/moving-from-mailgun.md").read_text(encoding="utf-8")
CLIENTS = ROOT / "tests/clients"
KEY = "a-long-random-key"


def blocks(language: str) -> list[str]:
    """The blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


class Served:
    """A relay with its HTTP interface, and a mail host for dest.example with a good certificate."""

    def __init__(self, sandbox: Sandbox, mx: MxServer, url: str) -> None:
        self.sandbox = sandbox
        self.mx = mx
        self.url = url

    async def run(self, *command: str, cwd: Path) -> str:
        """A command of somebody's who moved; what it printed."""
        environment = {**os.environ, "RELAY": self.url, "KEY": KEY}
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=patient(60),
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    async def shell(self, script: str, cwd: Path) -> list[Any]:
        """Commands of a shell; every answer of curl has to be a good one."""
        strict = "curl() { command curl --fail-with-body --show-error -w '\\n' \"$@\"; }\n"
        printed = await self.run("bash", "-euo", "pipefail", "-c", strict + script, cwd=cwd)
        return [json.loads(line) for line in printed.splitlines() if line.strip()]


@pytest.fixture
async def served(sandbox: Sandbox) -> Served:
    mx = await sandbox.domain("dest.example")
    port = free_port()
    await sandbox.start(
        admin={
            "http": f"127.0.0.1:{port}",
            "api_keys": [KEY],
            "webhook_signing_key": "signs",
            "webhook_networks": ["127.0.0.0/8"],
        }
    )
    return Served(sandbox, mx, f"http://127.0.0.1:{port}")


async def received(served: Served, recipient: str) -> EmailMessage:
    """What the mail host got for somebody."""
    [event] = await served.sandbox.attempts(recipient)
    assert event["event"] == "delivered"
    content = next(
        one.content
        for one in served.mx.messages
        if any(recipient in named for named in one.recipients)
    )
    return email.message_from_bytes(content, policy=email.policy.default)


@functools.cache
def node_modules() -> Path:
    """Mailgun's client for Node.js and Nodemailer's transport for it, installed once a run."""
    directory = Path(tempfile.mkdtemp(prefix="clients-"))
    shutil.copy(CLIENTS / "package.json", directory)
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=patient(150), check=False
    )
    if done.returncode and os.environ.get("RELAY_REQUIRE_TOOLS") != "1":
        pytest.skip(f"mailgun.js could not be installed: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return directory


# --- the three lines it began with ----------------------------------------------------------------


@pytest.mark.needs("curl")
async def test_the_three_commands_of_the_announcement_work_as_written(
    served: Served, tmp_path: Path
) -> None:
    [sent] = await served.shell(
        """curl -s --user "api:$KEY" \\
            $RELAY/v3/samples.mailgun.org/messages \\
            -F from='Sender Bob <sbob@samples.mailgun.org>' \\
            -F to='alice@dest.example' \\
            -F subject='Hello' \\
            -F text='Testing some Mailgun awesomness!' \\
            -F o:require-tls=True \\
            -F o:skip-verification=False""",
        tmp_path,
    )
    assert sent["message"] == "Queued. Thank you."
    put, get = await served.shell(
        """curl -s --user "api:$KEY" -X PUT \\
            $RELAY/v3/domains/samples.mailgun.org/connection \\
            -F require_tls=True \\
            -F skip_verification=True
        curl -s --user "api:$KEY" $RELAY/v3/domains/samples.mailgun.org/connection""",
        tmp_path,
    )
    assert (put["require-tls"], put["skip-verification"]) == (True, True)
    assert get["connection"] == {"require_tls": True, "skip_verification": True}

    [event] = await served.sandbox.attempts("alice@dest.example")
    assert event["event"] == "delivered"
    assert event["policy"]["require-tls-source"] == "message"
    status = event["delivery-status"]
    assert (status["tls"], status["certificate-verified"]) == (True, True)
    assert (status["mx-host"], status["code"]) == ("mx.dest.example", 250)
    assert status["session-seconds"] > 0
    assert {"description", "message"} <= set(status)
    assert served.mx.messages[0].reverse_path == "sbob@samples.mailgun.org"


async def test_settings_made_over_http_hold_for_smtp_at_once(served: Served) -> None:
    client = Client(auth=("api", KEY), api_url=served.url)
    settings = {"require_tls": "yes", "skip_verification": "no"}
    await asyncio.to_thread(client.domains_connection.put, domain="example.com", data=settings)
    await served.sandbox.submit("ann@example.com", "bob@dest.example")
    [event] = await served.sandbox.attempts("bob@dest.example")
    assert event["policy"] == {
        "require-tls": True,
        "skip-verification": False,
        "require-tls-source": "api",
        "skip-verification-source": "api",
        "requiretls": False,
        "tls-required-no": False,
    }
    assert served.sandbox.relay is not None
    asked = ("explain", "--from", "ann@example.com", "--to", "bob@dest.example", "--json")
    answer = json.loads((await asyncio.to_thread(served.sandbox.relay.run, *asked)).stdout)
    assert answer["policy"]["require-tls"] == {
        "value": True,
        "source": "api",
        "rule": "example.com",
    }
    assert await asyncio.to_thread(served.sandbox.relay.stop) == 0
    answer = json.loads((await asyncio.to_thread(served.sandbox.relay.run, *asked)).stdout)
    assert answer["policy"]["require-tls"]["source"] == "api"


# --- Python ---------------------------------------------------------------------------------------


async def test_mailgun_client_for_python_sends_through_the_relay(served: Served) -> None:
    client = Client(auth=("api", KEY), api_url=served.url)
    await asyncio.to_thread(_use, client)
    assert await asyncio.to_thread(client.events.get, domain="example.com") is not None
    [event] = await served.sandbox.attempts("r0@dest.example")
    assert event["delivery-status"]["tls"] is True
    ids = await asyncio.to_thread(_walk, client)
    assert len(ids) == len(set(ids)) >= 5


def _use(client: Client) -> None:
    for number in range(5):
        message = {
            "from": "Jörg <joerg@example.com>",
            "to": [f"r{number}@dest.example"],
            "subject": "Grüße",
            "text": "hello",
            "html": "<p>hello",
            "o:require-tls": "yes",
            "o:tag": ["a", "b"],
        }
        files = [("attachment", ("a.txt", b"content of a"))]
        sent = client.messages.create(data=message, files=files, domain="example.com")
        assert (sent.status_code, sent.json()["message"]) == (200, "Queued. Thank you.")
    mime = b"From: a@example.com\r\nTo: m@dest.example\r\nSubject: x\r\n\r\nhello\r\n"
    made = client.mimemessage.create(
        data={"to": "m@dest.example"}, files={"message": mime}, domain="example.com"
    )
    assert made.status_code == 200
    assert client.domains.get(domain_name="example.com").json()["domain"]["state"] == "active"
    put = client.domains_connection.put(domain="example.com", data={"require_tls": "true"})
    assert put.json()["require-tls"] is True
    assert (
        client.domains_connection.get(domain="example.com").json()["connection"]["require_tls"]
        is True
    )
    assert client.domainlist.get().json()["items"][0]["name"] == "example.com"
    hook = client.domains_webhooks.create(
        domain="example.com", data={"id": "delivered", "url": ["http://127.0.0.1:9/"]}
    )
    assert hook.status_code == 200
    assert "delivered" in client.domains_webhooks.get(domain="example.com").json()["webhooks"]


def _walk(client: Client) -> list[str]:
    filters = {"limit": 2, "event": "accepted", "ascending": "yes"}
    return [event["id"] for event in client.events.stream(domain="example.com", filters=filters)]


# --- Node.js --------------------------------------------------------------------------------------

SCRIPT = """
import assert from 'node:assert';
import formData from 'form-data';
import Mailgun from 'mailgun.js';

const client = new Mailgun(formData).client(
  {username: 'api', key: process.env.KEY, url: process.env.RELAY});
const domain = 'example.com';
for (let n = 0; n < 5; n++) {
  const sent = await client.messages.create(domain, {
    from: 'Jörg <joerg@example.com>', to: [`r${n}@dest.example`], subject: 'Grüße', text: 'hello',
    'o:require-tls': true, 'o:skip-verification': false,
    attachment: {data: Buffer.from('content of a'), filename: 'a.txt'},
  });
  assert.equal(sent.status, 200);
  assert.equal(sent.message, 'Queued. Thank you.');
}
const mime = Buffer.from('From: a@example.com\\nTo: m@dest.example\\nSubject: x\\n\\nhello\\n');
const sent = await client.messages.create(domain, {to: ['m@dest.example'], message: mime});
assert.equal(sent.status, 200);

const updated = await client.domains.update(domain, {require_tls: true, skip_verification: false});
assert.equal(updated.require_tls, true);
assert.equal((await client.domains.get(domain)).require_tls, true);
assert.equal((await client.domains.list())[0].name, domain);

const ids = [];
let page = await client.events.get(domain, {limit: 2, event: 'accepted', ascending: 'yes'});
while (page.items.length) {
  ids.push(...page.items.map((item) => item.id));
  page = await client.events.get(domain, {page: page.pages.next.page});
}
assert.equal(new Set(ids).size, 6);
assert.equal(ids.length, 6);

await client.webhooks.create(domain, 'delivered', 'http://127.0.0.1:9/');
assert.deepEqual((await client.webhooks.get(domain, 'delivered')).urls, ['http://127.0.0.1:9/']);
assert.deepEqual(Object.keys(await client.webhooks.list(domain, {})), ['delivered']);
await client.webhooks.destroy(domain, 'delivered');

const wrong = new Mailgun(formData).client({username: 'api', key: 'wrong', url: process.env.RELAY});
const plain = {from: 'a@example.com', to: 'b@dest.example', text: 'x'};
await assert.rejects(wrong.messages.create(domain, plain),
  (error) => error.status === 401);
await assert.rejects(client.messages.create(domain, {to: 'b@dest.example', text: 'x'}),
  (error) => error.status === 400 && error.details === 'from parameter is missing');
"""


@pytest.mark.needs("node", "npm")
async def test_mailgun_client_for_node_sends_through_the_relay(served: Served) -> None:
    directory = await asyncio.to_thread(node_modules)
    (directory / "use.mjs").write_text(SCRIPT)
    await served.run("node", "use.mjs", cwd=directory)
    [event] = await served.sandbox.attempts("r0@dest.example")
    assert (event["delivery-status"]["tls"], event["policy"]["require-tls-source"]) == (
        True,
        "message",
    )
    message = next(one for one in served.mx.messages if "r0@" in one.recipients[0])
    assert b'Content-Disposition: attachment; filename="a.txt"' in message.content


# --- mailers of frameworks ------------------------------------------------------------------------

NODEMAILER = """
import assert from 'node:assert';
import nodemailer from 'nodemailer';
import mailgun from 'nodemailer-mailgun-transport';

const transport = nodemailer.createTransport(mailgun({
  auth: {api_key: process.env.KEY, domain: 'example.com'}, url: process.env.RELAY,
}));
const info = await transport.sendMail({
  from: {name: 'Doe, Jane', address: 'jane@example.com'},
  to: [{name: 'Bob', address: 'bob@dest.example'}],
  replyTo: 'help@example.com', messageId: 'own@example.com', subject: 'Grüße',
  html: '<img src="cid:my logo (1).png">',
  attachments: [
    {filename: 'invitation.ics', content: 'BEGIN:VCALENDAR',
      contentType: 'text/calendar; method=REQUEST'},
    {cid: 'my logo (1).png', filename: 'logo.png', content: Buffer.from('picture'),
      contentType: 'image/png'},
  ],
  'h:X-Order': '7', 'v:order': '7', 'o:tag': ['a', 'b'], 'o:tracking': 'yes', 'o:dkim': 'yes',
});
assert.equal(info.messageId, '<own@example.com>');
const refused = {from: 'a@example.com', to: 'b@dest.example', text: 'x', template: 'welcome'};
await assert.rejects(transport.sendMail(refused),
  (error) => error.status === 400 && error.details.startsWith('template parameter'));
"""


@pytest.mark.needs("node", "npm")
async def test_mailgun_transport_of_nodemailer_sends_through_the_relay(served: Served) -> None:
    directory = await asyncio.to_thread(node_modules)
    (directory / "nodemailer.mjs").write_text(NODEMAILER)
    await served.run("node", "nodemailer.mjs", cwd=directory)
    message = await received(served, "bob@dest.example")
    assert message["from"] == '"Doe, Jane" <jane@example.com>'
    assert (message["reply-to"], message["x-order"]) == ("help@example.com", "7")
    by_type = {part.get_content_type(): part for part in message.walk()}
    assert by_type["text/calendar"].get_param("method") == "REQUEST"
    assert by_type["image/png"]["content-id"] == "<my logo (1).png>"


DJANGO = """
import os
from email.message import MIMEPart
from django.conf import settings
url = os.environ["RELAY"] + "/v3"
settings.configure(ANYMAIL={"MAILGUN_API_KEY": os.environ["KEY"], "MAILGUN_API_URL": url})
import django
django.setup()
from datetime import datetime, timezone, timedelta
from anymail.exceptions import AnymailRequestsAPIError
from anymail.message import AnymailMessage
from django.core.mail import get_connection

connection = get_connection("anymail.backends.mailgun.EmailBackend")
message = AnymailMessage(
    subject="Grüße", body="hello", from_email='"Müller, Jörg" <joerg@example.com>',
    to=["Bob <bob@dest.example>", '"Süß, Carl" <carl@dest.example>'],
    cc=["dora@bücher.example"], bcc=["secret@dest.example"],
    reply_to=["a@example.com", "b@example.com"],
    headers={"Message-ID": "<own@example.com>", "References": "<a@b> <c@d>", "X-Umlaut": "ü"},
    connection=connection,
)
message.attach_alternative('<img src="cid:x">', "text/html")
message.attach("größe (1).pdf", b"%PDF", "application/pdf")
message.attach("invitation.ics", "BEGIN:VCALENDAR", "text/calendar; method=REQUEST")
message.metadata = {"order": 7, "note": "ü"}
message.tags = ["a"]
message.track_opens = True
message.send()
assert message.anymail_status.message_id == "<own@example.com>", message.anymail_status

batch = AnymailMessage(
    subject="x", body="x", from_email="a@example.com", to=["b@dest.example"],
    connection=connection,
)
batch.merge_data = {"b@dest.example": {"name": "Bob"}}
try:
    batch.send()
except AnymailRequestsAPIError as error:
    assert "recipient-variables" in str(error)
else:
    raise AssertionError("a batch was taken")
"""


async def test_mailer_of_django_sends_through_the_relay(served: Served, tmp_path: Path) -> None:
    await served.run(sys.executable, "-W", "ignore", "-c", DJANGO, cwd=tmp_path)
    message = await received(served, "bob@dest.example")
    assert [box.display_name for box in message["from"].addresses] == ["Müller, Jörg"]
    assert [box.display_name for box in message["to"].addresses] == ["Bob", "Süß, Carl"]
    assert message["cc"] == "dora@xn--bcher-kva.example"
    assert message["reply-to"] == "a@example.com, b@example.com"
    assert (message["references"], message["x-umlaut"]) == ("<a@b> <c@d>", "ü")
    parts = {part.get_filename(): part for part in message.iter_attachments()}
    assert set(parts) == {"größe (1).pdf", "invitation.ics"}
    assert parts["invitation.ics"].get_param("method") == "REQUEST"
    assert "secret" not in message.as_string()
    events = served.sandbox.events(event="accepted")
    assert events[0]["user-variables"] == {"order": "7", "note": "ü"}
    targets = events[0]["envelope"]["targets"].split(",")
    assert set(targets) == {
        "bob@dest.example",
        "carl@dest.example",
        "dora@xn--bcher-kva.example",
        "secret@dest.example",
    }


def part(name: str, value: str, *fields: str, filename: str | None = None) -> str:
    """A part of multipart/form-data."""
    file = "" if filename is None else f'; filename="{filename}"'
    disposition = f'Content-Disposition: form-data; name="{name}"{file}'
    return "\r\n".join((disposition, *fields, "", value))


UTF8 = ("Content-Type: text/plain; charset=utf-8", "Content-Transfer-Encoding: 8bit")
SYMFONY = (
    part("from", '"Ann" <ann@example.com>', *UTF8),
    part("to", '"Bob" <bob@dest.example>', *UTF8),
    part("subject", "Grüße", *UTF8),
    part("html", '<img src="cid:my logo (1).png">', *UTF8),
    part(
        "attachment[0]",
        "x",
        "Content-Type: text/calendar; name=i.ics; method=REQUEST",
        filename="i.ics",
    ),
    part("inline[0]", "y", "Content-Type: image/png; name=logo", filename="my logo (1).png"),
    part("h:Reply-To", "=?utf-8?Q?J=C3=B6rg?=\r\n <j@example.com>", *UTF8),
    part("h:References", "<1@example.com>\r\n <2@example.com>", *UTF8),
    part("h:Return-Path", "<bounces@example.com>", *UTF8),
    part("h:Sender", "ann@example.com", *UTF8),
    part("o:tag", "a", *UTF8),
    part("v:order", "7", *UTF8),
)
WORDPRESS = (
    part("from", "Foo, Inc. <ann@example.com>"),
    part("h:Sender", "ann@example.com"),
    part("to", "bob@dest.example"),
    part("subject", "Grüße"),
    part("o:tracking-clicks", "htmlonly"),
    part("o:tracking-opens", "no"),
    part("o:tag", "site"),
    part("html", '<img src="cid:my logo (1).png">'),
    part("h:MIME-Version", "1.0"),
    part("h:Content-Type", "text/html; charset=UTF-8"),
    part("h:References", "<1@example.com> <2@example.com>"),
    part("h:Reply-To", "Jörg <j@example.com>"),
    part("attachment[0]", "x", "Content-Type: text/calendar; method=REQUEST", filename="i.ics"),
    part("inline[0]", "y", filename="my logo (1).png"),
)
RAILS = (
    part("from[]", "ann@example.com (Cron Daemon)"),
    part("h:reply-to", "=?utf-8?Q?J=C3=B6rg?= <j@example.com>"),
    part("subject[]", "Grüße"),
    part("html[]", '<img src="cid:my logo (1).png">'),
    part("text[]", "text"),
    part("to[]", "bob@dest.example"),
    part("attachment[]", "x", "Content-Type: text/calendar; method=REQUEST", filename="i.ics"),
    part("inline[]", "y", "Content-Type: image/png", filename="my logo (1).png"),
    part("h:date", "Fri, 20 Nov 2026 12:00:00 +0000"),
    part("h:message-id", "<own@example.com>"),
    part("h:mime-version", "1.0"),
    part("h:content-type", "multipart/mixed;\r\n boundary=x;\r\n charset=UTF-8"),
    part("h:content-transfer-encoding", "7bit"),
    part("h:references", "<1@example.com>\r\n <2@example.com>"),
    part("o:testmode", "no"),
)


@pytest.mark.parametrize(
    "parts", [SYMFONY, WORDPRESS, RAILS], ids=["symfony", "wordpress", "rails"]
)
async def test_forms_of_other_mailers_are_accepted(served: Served, parts: tuple[str, ...]) -> None:
    """As their sources write them: Symfony's Mailgun bridge, Mailgun's WordPress plugin and
    Railgun.
    """
    body = "".join(f"--limit\r\n{one}\r\n" for one in parts) + "--limit--"
    headers = {
        "Content-Type": "multipart/form-data; boundary=limit",
        "Authorization": f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}",
    }
    async with aiohttp.ClientSession() as http:
        url = f"{served.url}/v3/example.com/messages"
        async with http.post(url, data=body.encode(), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
    message = await received(served, "bob@dest.example")
    assert message["subject"] == "Grüße"
    assert [box.addr_spec for box in message["from"].addresses] == ["ann@example.com"]
    [reply_to] = message["reply-to"].addresses
    assert (reply_to.display_name, reply_to.addr_spec) == ("Jörg", "j@example.com")
    assert message["references"].split() == ["<1@example.com>", "<2@example.com>"]
    assert message["return-path"] is None
    names = [name.lower() for name in message]
    assert (names.count("mime-version"), names.count("content-type")) == (1, 1)
    by_type = {part.get_content_type(): part for part in message.walk()}
    assert by_type["text/calendar"].get_param("method") == "REQUEST"
    assert by_type["image/png"]["content-id"] == "<my logo (1).png>"
    assert by_type["text/html"].get_content().strip() == '<img src="cid:my logo (1).png">'


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.needs("curl")
async def test_commands_of_the_mailgun_page_work_as_described(
    served: Served, tmp_path: Path
) -> None:
    answers = [answer for script in blocks("sh") for answer in await served.shell(script, tmp_path)]
    assert len(answers) == PAGE.count("curl -s")
    [event] = [
        e for e in await served.sandbox.attempts("carl@dest.example") if e["event"] == "delivered"
    ]
    assert event["tags"] == ["reports"]
    assert event["user-variables"] == {"order": "4711"}
    subjects = {
        line
        for one in served.mx.messages
        for line in one.content.split(b"\r\n")
        if line[:8] == b"Subject:"
    }
    assert {b"Subject: Hello", b"Subject: made already", b"Subject: Your report"} <= subjects
    assert not [one for one in served.mx.messages if b"Nobody gets this" in one.content]


@pytest.mark.needs("curl")
async def test_the_three_lines_of_the_readme_work_as_written(
    served: Served, tmp_path: Path
) -> None:
    section = README.partition("## Instead of Mailgun\n")[2].partition("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    curl")]
    sent, settings, events = await served.shell("\n".join(lines), tmp_path)
    assert sent["message"] == "Queued. Thank you."
    assert settings["require_tls"] is True
    assert set(events) == {"items", "paging"}


async def test_python_of_the_mailgun_page_runs(served: Served, tmp_path: Path) -> None:
    [script] = blocks("python")
    printed = await served.run(sys.executable, "-c", script, cwd=tmp_path)
    assert "Queued. Thank you." in printed
    assert "\naccepted " in printed


@pytest.mark.needs("node", "npm")
async def test_javascript_of_the_mailgun_page_runs(served: Served) -> None:
    directory = await asyncio.to_thread(node_modules)
    [script] = blocks("js")
    (directory / "page.mjs").write_text(script)
    printed = await served.run("node", "page.mjs", cwd=directory)
    assert "Queued. Thank you." in printed
    assert "\naccepted " in printed


# --- several workers ------------------------------------------------------------------------------


async def test_settings_made_over_http_hold_at_every_worker_at_once(sandbox: Sandbox) -> None:
    await sandbox.domain("dest.example")
    port = free_port()
    relay = await sandbox.prepare(admin={"http": f"127.0.0.1:{port}", "api_keys": [KEY]})
    relay.config["workers"] = 3
    await asyncio.to_thread(relay.start)
    client = Client(auth=("api", KEY), api_url=f"http://127.0.0.1:{port}")
    for wanted in (True, False):
        value = {"require_tls": str(wanted)}
        put = await asyncio.to_thread(
            client.domains_connection.put, domain="example.com", data=value
        )
        assert put.status_code == 200
        # Each session is some worker's: with so many, each has one.
        for number in range(24):
            await sandbox.submit("ann@example.com", f"r{wanted}{number}@dest.example")
    for wanted in (True, False):
        for number in range(24):
            [event] = await sandbox.attempts(f"r{wanted}{number}@dest.example")
            policy = event["policy"]
            assert (policy["require-tls"], policy["require-tls-source"]) == (wanted, "api")
    assert await asyncio.to_thread(relay.stop) == 0
