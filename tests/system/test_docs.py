"""The code blocks of the pages under docs/ are correct.

links     lead to files and headings that are there; the site is built of the pages
log lines in docs/troubleshooting.md are those of the program
yaml      passes `relay check`
sh        runs line by line against a relay of the test; the test replaces `systemctl`
postfix   is main.cf of a real Postfix, through which mail then flows
ini       has keys and values; no program here reads it
"""

from __future__ import annotations

import ast
import json
import os
import re
import smtplib
import stat
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import trustme
import yaml
from argon2 import PasswordHasher
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from relay.cli import relay as command
from relay.sign.keys import new_key
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, open_directory, wait_until
from tests.rigs.postfix import postfix
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink, sink

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"moving-from-mailgun.md"}
"""Has its own test, with the clients it is about."""

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ELSEWHERE]

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NOT_RUN = {
    "apt ": "tests/packages installs, upgrades and purges",
    "dnf ": "tests/packages looks into the package",
    "docker ": "tests/image builds the image and runs it",
    "editor ": "a person's part",
    "install -m 0644 systemd/": "tests/system/test_service.py runs what the unit says",
    "install -D -m 0640 systemd/": "the same",
    "openssl x509 -in mx.pem": "a test of its own has the certificate",
    "make run": "tests/system/test_try_out.py does",
    "python3 -m venv /opt/relay": "tests/packages has a virtual environment there",
    "/opt/relay/bin/pip ": "the same",
    "python3 examples/send.py": "tests/system/test_first_message.py does",
    "relay demo": "tests/unit/sandbox plays it",
    "relay login ": "tests/system/test_oauth2.py does, with a token server",
    "relay route test ": "the same, with a host that asks for a login",
    "runuser -u relay -- relay queue ": "tests/system/test_queue_move.py does, as root",
    "systemd-": "tests/packages does, in postinst",
    "usermod ": "tests/packages lets a user into the group",
    "postfix reload": "the tests of main.cf start a Postfix of their own",
}


def blocks(language: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    """Each block of a language: where it stands, and its text."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == language:
                found.append((f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}", match[2]))
    return found


def test_every_block_is_of_a_language_that_is_tested() -> None:
    languages = {
        match[1] for page in PAGES for match in _FENCE.finditer(page.read_text(encoding="utf-8"))
    }
    assert languages <= {"yaml", "sh", "postfix", "ini"}


# --- pages ----------------------------------------------------------------------------------------

_MARKDOWN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def _anchors(page: Path) -> set[str]:
    """The headings of a page, as a browser names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _MARKDOWN, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: the site lists no directories"
        assert not anchor or anchor in _anchors(target), link


def test_every_page_is_listed() -> None:
    listed = re.findall(r"\]\((\w[^)]*)\)", (ROOT / "docs/README.md").read_text())
    of_site = re.findall(r'"([^"]+\.md)"', (ROOT / "docs/site/zensical.toml").read_text())
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in listed or page.name == "README.md"
        assert page.name in of_site or page.name == "README.md"


def test_the_site_is_built_with_its_reference_pages(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs/site/build.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, wanted in {
        "configuration": "queue.lifetime",
        "commands": "relay queue remove",
        "http": "/relay/v1/queue/{verb}",
        "metrics": "relay_tls_downgrades_total",
        "delivery-log": "certificate-verified",
    }.items():
        assert wanted in (tmp_path / f"site/reference/{name}.html").read_text(), name
    assert "troubleshooting" in (tmp_path / "site/search.json").read_text().lower()


def _texts_of_the_program() -> str:
    """Every text in the code, with NUL where something is filled in."""
    texts = []
    for module in (ROOT / "relay").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(text)):
                    texts.append(re.sub(r"%[-.\d]*[a-z]", "\0", text))
                case ast.Constant(value=bytes(octets)):
                    texts.append(octets.decode("latin-1"))
                case ast.JoinedStr(values=parts):
                    known = [one.value if isinstance(one, ast.Constant) else "\0" for one in parts]
                    texts.append("".join(map(str, known)))
    return "\n".join(texts)


def test_log_lines_in_troubleshooting_are_the_programs_own() -> None:
    page, texts = (ROOT / "docs/troubleshooting.md").read_text(), _texts_of_the_program()
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    quoted = [said for row in rows for said in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 30
    for said in quoted:
        without_code = re.sub(r"^\d{3} \d\.\d+\.\d+ ", "", said)
        for part in without_code.split("…"):
            assert part.strip(" .:;,=") in texts, said


# --- yaml -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that snippets name, and what stands for them here."""
    directory = tmp_path_factory.mktemp("etc")
    authority = trustme.CA()
    leaf = authority.issue_cert("relay.example.net")
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(directory / "tls.pem"))
    leaf.private_key_pem.write_to_path(str(directory / "tls.key"))
    new_key(directory / "dkim.pem", kind="ed25519")
    (directory / "password").write_text("secret")
    account = {"client_email": "relay@example.iam", "private_key": _rsa_key()}
    (directory / "google.json").write_text(json.dumps(account))
    return {
        "/etc/relay/client.pem": f"{directory}/tls.pem",
        "/etc/relay/client.key": f"{directory}/tls.key",
        "/etc/relay/google.json": f"{directory}/google.json",
        "/etc/relay/m365.secret": f"{directory}/password",
        "/etc/relay/partner-ca.pem": f"{directory}/ca.pem",
        "/etc/relay/ses.password": f"{directory}/password",
        "/etc/relay/tls.pem": f"{directory}/tls.pem",
        "/etc/relay/tls.key": f"{directory}/tls.key",
        "/etc/relay/dkim/example.com.pem": f"{directory}/dkim.pem",
        "/etc/relay/other.password": f"{directory}/password",
        "/etc/relay/provider.password": f"{directory}/password",
    }


def _rsa_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, form, serialization.NoEncryption()).decode()


@pytest.mark.parametrize(("where", "text"), blocks("yaml"))
def test_a_configuration_in_the_docs_passes_the_check(
    where: str, text: str, files: dict[str, str], tmp_path: Path
) -> None:
    for named, there in files.items():
        text = text.replace(named, there)
    (tmp_path / "relay.yaml").write_text(text)
    result = CliRunner().invoke(
        command, ["check", "--file-only", "-c", str(tmp_path / "relay.yaml")]
    )
    assert result.exit_code == 0, f"{where}: {result.stderr}"


@pytest.mark.needs("openssl")
def test_the_command_for_a_pin_makes_the_digest_of_the_public_key(tmp_path: Path) -> None:
    leaf = trustme.CA().issue_cert("mx.example.net").cert_chain_pems[0].bytes()
    (tmp_path / "mx.pem").write_bytes(leaf)
    page = (ROOT / "docs/routes.md").read_text()
    [command] = re.findall(r"^openssl x509 .*\n.*base64$", page, re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    spki = x509.load_pem_x509_certificate(leaf).public_key()
    octets = spki.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert done.stdout.strip() == b64encode(sha256(octets).digest()).decode()


@pytest.mark.parametrize(("where", "text"), blocks("ini"))
def test_settings_of_others_are_keys_and_values(where: str, text: str) -> None:
    for line in text.splitlines():
        assert re.fullmatch(r"[;#].*|[\w.]+ = \S.*", line), f"{where}: {line}"


# --- sh -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Iterator[Sink]:
    with sink() as found:
        yield found


@pytest.fixture
def relay(tmp_path: Path, host: Sink) -> Iterator[Relay]:
    with relay_with_mail(tmp_path, host) as process:
        yield process


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, host: Sink) -> Iterator[Relay]:
    """The relay of all pages that do not stop it."""
    with relay_with_mail(tmp_path_factory.mktemp("standing"), host) as process:
        yield process


@contextmanager
def relay_with_mail(directory: Path, host: Sink) -> Iterator[Relay]:
    """A relay with events in its log and mail in its queue, at the paths that the docs name."""
    routes = {**host.route, "gone.example": {"host": "[127.0.0.1]", "port": free_port()}}
    with relay_process(directory, routes=routes, resolver={"timeout": "1s"}) as process:
        for recipient in ("b@example.net", "b@gone.example"):
            with smtplib.SMTP("127.0.0.1", process.port, timeout=patient(20)) as client:
                client.sendmail("a@legal.example", recipient, "Subject: hello\r\n\r\nbody\r\n")
        wait_until(lambda: len(process.events()) >= 4, what="two attempts")
        yield process


def shell(relay: Relay, script: str) -> None:
    """Lines as typed, with this test's paths in the place of a machine's."""
    directory = relay.directory
    for named, there in {
        "/var/log/relay/": f"{directory}/log/",
        "/var/lib/relay/spool": f"{directory}/spool",
        "/var/backups/": f"{directory}/backups/",
        "/srv/": f"{directory}/srv/",
        "/etc/": f"{directory}/etc/",
        "docs/fail2ban": f"{ROOT}/docs/fail2ban",
        "127.0.0.1:2525": f"127.0.0.1:{relay.port}",
    }.items():
        script = script.replace(named, there)
    for name in ("bin", "backups", "srv", "etc/fail2ban/filter.d", "etc/relay/dkim", "etc/postfix"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "etc/postfix/tls_policy").write_text("partner.example secure\n")
    (directory / "etc/postfix/sender_relay").write_text("@example.com [relay.example.net]\n")
    (directory / "bin/relay").write_text(f'#!/bin/sh\nexec {sys.executable} -m relay "$@"\n')
    (directory / "bin/relay").chmod(stat.S_IRWXU)
    environ = {"PATH": f"{directory}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env={**os.environ, **environ, "RELAY_CONFIG": str(relay.config_file)},
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def typed(text: str) -> Iterator[tuple[str, str]]:
    """What is typed, as ("systemctl", verb) or ("shell", lines); what is not run is left out."""
    lines: list[str] = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("systemctl "):
            if lines:
                yield "shell", "\n".join(lines)
            lines = []
            yield "systemctl", line.split()[1]
        elif line and not line.startswith("#") and not line.startswith(tuple(NOT_RUN)):
            lines.append(line)
    if lines:
        yield "shell", "\n".join(lines)


@pytest.mark.needs("jq", "curl")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks("sh", [page])], ids=lambda page: page.name
)
def test_commands_in_the_docs_are_understood(page: Path, request: pytest.FixtureRequest) -> None:
    of_page = "\n".join(text for _, text in blocks("sh", [page]))
    stops = re.search(r"^systemctl (stop|start|restart)", of_page, re.MULTILINE)
    relay: Relay = request.getfixturevalue("relay" if stops else "standing")
    for _, text in blocks("sh", [page]):
        for kind, what in typed(text):
            if kind == "shell":
                shell(relay, what)
            elif what in ("stop", "start", "restart"):
                if what != "start":
                    assert relay.stop() == 0
                if what != "stop" and relay.process and relay.process.poll() is not None:
                    relay.start()
            else:
                assert what in ("reload", "enable", "daemon-reload")


@pytest.mark.needs("jq")
def test_commands_for_auditors_answer_their_questions(relay: Relay) -> None:
    page = (ROOT / "docs/reading-the-delivery-log.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("jq ")]

    def answer(line: str) -> str:
        line = line.replace("/var/log/relay/", f"{relay.directory}/log/")
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=True
        ).stdout

    in_clear, legal, *_, deferred = map(answer, lines)
    assert in_clear == "b@example.net\tstarttls-not-offered\n"
    assert legal.split("\t")[1:] == ["b@example.net", "false\n"]
    assert deferred.startswith("b@gone.example\t4.4.1\t")


# --- postfix --------------------------------------------------------------------------------------


def main_cf(number: int) -> dict[str, str]:
    _, text = blocks("postfix", [ROOT / "docs/smarthost-for-postfix.md"])[number]
    pairs = [line.split(" = ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {key: value for key, value in pairs}  # noqa: C416 - pairs are lists


def sent_through(
    settings: dict[str, str], host: Sink, subject: str, sender: str = "a@example.com"
) -> bytes:
    """A message through a Postfix with these settings, as the next hop of the relay got it."""
    port = free_port()
    with postfix(settings, port=port, name="docs") as client:
        with smtplib.SMTP("127.0.0.1", port, timeout=patient(30)) as session:
            text = f"From: {sender}\r\nSubject: {subject}\r\nX-Require-TLS: no\r\n\r\nbody\r\n"
            session.sendmail(sender, "b@example.net", text)
        wait_until(
            lambda: host.tokens({subject}),
            what=f"the delivery; {client.log_lines('status=')[-3:]}",
            seconds=30,
        )
    with host.lock:
        return next(
            content for content in host.contents if f"Subject: {subject}".encode() in content
        )


@pytest.mark.needs("postfix", "root")
def test_the_postfix_pages_settings_send_mail_through_the_relay(
    standing: Relay, host: Sink
) -> None:
    here = {"[127.0.0.1]:2525": f"[127.0.0.1]:{standing.port}"}

    def settings(number: int) -> dict[str, str]:
        return {key: _replaced(value, here) for key, value in main_cf(number).items()}

    got = sent_through(settings(0), host, "plain")
    assert b"by relay.test.example with ESMTP" in got
    braces = {
        key: value.replace("{", "{{").replace("}", "}}")
        for key, value in (settings(2) | settings(3)).items()
    }
    got = sent_through(braces, host, "bysender", sender="a@legal.example")
    assert b"by relay.test.example with ESMTP" in got
    assert b"X-Require-TLS" not in got


@pytest.mark.needs("postfix", "root")
def test_the_postfix_page_logs_in_over_verified_tls(tmp_path: Path, host: Sink) -> None:
    if not list(Path("/usr/lib").glob("*/sasl2/libplain.so*")):
        pytest.fail("needs libsasl2-modules") if os.environ.get(
            "RELAY_REQUIRE_TOOLS"
        ) == "1" else pytest.skip("needs libsasl2-modules from the operating system")
    authority = trustme.CA()
    leaf = authority.issue_cert("relay.example.net")
    (tmp_path / "tls.pem").write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
    with (
        open_directory("relay-test-ca-") as readable,  # Postfix reads it as its own user
        relay_process(tmp_path, start=False, routes=host.route) as relay,
    ):
        [text] = [
            t for _, t in blocks("yaml", [ROOT / "docs/smarthost-for-postfix.md"]) if "mail1" in t
        ]
        page = yaml.safe_load(text)
        user = page["access"]["users"]["mail1"]
        user["password"] = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("secret")
        relay.config["access"] = {**page["access"], "networks": []}
        listener = page["listeners"][1] | {
            "address": f"127.0.0.1:{relay.port}",
            "certificate": "tls.pem",
        }
        del listener["key"]
        relay.config["listeners"] = [listener]
        relay.start()
        settings = main_cf(1)
        assert settings["smtp_tls_security_level"] == "secure"
        (readable / "ca.pem").write_bytes(authority.cert_pem.bytes())
        settings |= {
            "relayhost": f"[127.0.0.1]:{relay.port}",
            "smtp_tls_CAfile": str(readable / "ca.pem"),
            "smtp_tls_secure_cert_match": "relay.example.net",  # no DNS here to make it of
        }
        got = sent_through(settings, host, "loggedin")
        assert b"by relay.test.example with ESMTPSA" in got


def _replaced(text: str, what: dict[str, str]) -> str:
    for old, new in what.items():
        text = text.replace(old, new)
    return text
