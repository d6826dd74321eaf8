"""The command line: what each command says, and with which exit code."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from argon2 import PasswordHasher
from click.testing import CliRunner, Result

from relay import __version__
from relay.admin.control import Control
from relay.admin.control_socket import start_control
from relay.admin.operator import Operator
from relay.cli import relay
from relay.cli.common import age_text, size_text
from relay.cli.log import _for_people
from relay.mail.printable import printable
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage
from relay.report import deliverylog
from tests.fakes.waiting import patient

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = TlsSettings(Setting(True, Source.DOMAIN, "example.com"), Setting(False, Source.DEFAULT))

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`relay …` in a directory of the test's own, with its relay.yaml."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("RELAY_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("RELAY_CONFIG", "relay.yaml")
    (tmp_path / "relay.yaml").write_text(
        "hostname: relay.example.net\nqueue: {path: spool}\nadmin: {socket: s}\n"
    )

    def call(*arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(relay, arguments, input=typed, prog_name="relay")

    return call


def new_message(queue_id: str, *recipients: str, sender: str = "a@example.com") -> NewMessage:
    content = b"Subject: hello\r\nX-Bad: \x1b[2J\r\n\r\nbody\r\n"
    arrived = datetime.now(UTC) - timedelta(hours=2)
    message = QueuedMessage(
        queue_id, sender, arrived, len(content), MessageSummary(subject="hello")
    )
    queued = tuple(
        QueuedRecipient(i, address, address.partition("@")[2], SETTINGS)
        for i, address in enumerate(recipients)
    )
    return NewMessage(message, queued, content, events=(deliverylog.accepted(message, queued),))


@pytest.fixture
def stopped_queue(tmp_path: Path) -> None:
    """Two messages in the queue of a relay that does not run."""

    async def fill() -> None:
        store = await SqliteStore.open(tmp_path / "spool")
        await store.accept(new_message("M1", "b@example.net"))
        await store.accept(new_message("M2", "b@example.net", "c@example.org", sender=""))
        await store.close()

    asyncio.run(fill())


@pytest.fixture
def running_queue(tmp_path: Path, stopped_queue: None) -> Iterator[None]:
    """The same, with a control socket that answers, in a process of its own."""
    script = (
        "import asyncio, sys; from tests.unit.test_cli import serve_queue;"
        " asyncio.run(serve_queue(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield
    process.stdin.close()
    assert process.wait(patient(10)) == 0
    process.stdout.close()


async def serve_queue(directory: str) -> None:
    store = await SqliteStore.open(Path(directory) / "spool")
    operator = Operator(store, lambda: datetime.now(UTC), store)
    server = await start_control(Control(operator), Path(directory) / "s")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    await store.close()


# --- the whole ------------------------------------------------------------------------------------


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in (
        "serve",
        "check",
        "queue",
        "log",
        "mta-sts",
        "tls-report",
        "explain",
        "probe",
        "password",
        "demo",
    ):
        assert f"\n  {command} " in result.output


@pytest.mark.parametrize(
    "command",
    ["serve", "check", "queue", "log", "mta-sts", "explain", "probe", "password", "demo"]
    + [f"mta-sts {verb}" for verb in ("list", "show", "refresh", "forget")]
    + [f"tls-report {verb}" for verb in ("list", "show", "send")]
    + [f"queue {verb}" for verb in ("list", "show", "retry", "hold", "release", "remove")],
)
def test_every_command_has_a_help_of_its_own(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Usage: relay {command}" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["queue", "fly"],
        ["queue", "show"],
        ["queue", "hold"],
        ["queue", "remove", "M1", "--all"],
        ["queue", "list", "--state", "lost"],
        ["queue", "list", "--older-than", "soon"],
        ["queue", "list", "--domain", "a b"],
        *(
            ["queue", verb, "--domain", "example.net", option, ""]
            for verb in ("list", "retry", "hold", "release", "remove")
            for option in ("--sender", "--domain", "--state", "--older-than")
        ),
        ["queue", "remove", "--domain", "example.net", "--sender", " "],
        ["queue", "remove", "--domain", "example.net", ""],
        ["queue", "show", ""],
        *(
            ["log", option, ""]
            for option in ("--sender", "--recipient", "--id", "--since", "--event")
        ),
        ["log", "--since", "yesterday"],
        ["log", "--lines", "0"],
        ["explain", "--from", "a@example.com"],
        ["explain", "--from", "a@example.com", "--to", "nobody"],
        ["explain", "--from", "a@example.com", "--to", "b@example.net", "--require-tls", "perhaps"],
        ["mta-sts", "show"],
        ["mta-sts", "forget", ""],
        ["tls-report", "show"],
        ["tls-report", "show", "b.example", "--day", "yesterday"],
        ["tls-report", "send", ""],
        ["route", "show", ""],
        ["route", "test", ""],
        ["login", ""],
        ["check", "--frobnicate"],
    ],
)
def test_command_that_is_not_understood_ends_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Usage: relay" in result.output


def test_version_imports_no_large_library() -> None:
    script = (
        "import sys; from relay.cli import relay\n"
        "try: relay(['--version'])\n"
        "except SystemExit: pass\n"
        "heavy = {'asyncio', 'pydantic', 'yaml', 'dns', 'cryptography', 'rich', 'uvloop'} &"
        " set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith(f"relay {__version__}\nPython ")


def test_plugin_of_pydantic_that_is_installed_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text("print('here')\nplugin = None\n")
    (tmp_path / "stranger-1.dist-info").mkdir()
    (tmp_path / "stranger-1.dist-info/METADATA").write_text("Name: stranger\nVersion: 1\n")
    points = tmp_path / "stranger-1.dist-info/entry_points.txt"
    points.write_text("[pydantic]\nstranger = stranger:plugin\n")
    (tmp_path / "relay.yaml").write_text("hostname: relay.test.example\n")
    done = subprocess.run(
        [sys.executable, "-m", "relay", "check", "--file-only", "-c", "relay.yaml"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert "queue:" in done.stdout
    assert "here" not in done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith(f"relay {__version__}\nPython ")


# --- check ----------------------------------------------------------------------------------------


def test_check_prints_what_is_in_effect(run: Run) -> None:
    result = run("check")
    assert result.exit_code == 0
    document = yaml.safe_load(result.stdout)
    assert document["hostname"] == "relay.example.net"
    assert document["limits"]["message_size"] == "50MiB"


def test_check_says_all_that_is_wrong_and_ends_with_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("hostnme: a\nqueue: {lifetime: 5}\n")
    result = run("check", "-c", "bad.yaml")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        'bad.yaml:1: hostnme: unknown key; did you mean "hostname"?',
        'bad.yaml:2: queue.lifetime: "5" is not a duration; write a unit, as in 5d',
    ]


def test_warnings_do_not_fail_a_check(run: Run, tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text("hostname: short\n")
    result = run("check")
    assert result.exit_code == 0
    assert "warning: relay.yaml:1: hostname: short is no full domain name" in result.stderr
    quiet = run("check", "--quiet", "--file-only")
    assert (quiet.exit_code, quiet.stdout) == (0, "")


@pytest.mark.parametrize("command", ["serve", "queue list", "log"])
def test_every_command_refuses_a_broken_configuration(
    run: Run, tmp_path: Path, command: str
) -> None:
    (tmp_path / "relay.yaml").write_text("fly: high\n")
    result = subprocess.run(
        [sys.executable, "-m", "relay", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    assert "relay.yaml:1: fly: unknown key" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_configuration_is_named_before_or_behind_the_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("hostname: other.example\n")
    for arguments in (["-c", "other.yaml", "check"], ["check", "-c", "other.yaml"]):
        assert "hostname: other.example" in run(*arguments).output
    assert run("queue", "-c", "nowhere.yaml", "list").exit_code == 1
    assert run("queue", "list", "-c", "nowhere.yaml").exit_code == 1


# --- password -------------------------------------------------------------------------------------


def test_password_hashes_what_is_given_on_stdin(run: Run) -> None:
    result = run("password", typed="correct horse\n")
    assert result.exit_code == 0
    assert PasswordHasher().verify(result.stdout.strip(), "correct horse")


def test_an_empty_password_is_refused(run: Run) -> None:
    assert run("password", typed="\n").exit_code == 1


# --- the queue of a stopped relay -----------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["queue list", "queue list --json", "queue show M1", "log", "log --json", "health"]
)
@pytest.mark.parametrize("made", ["nothing", "a directory", "a file"])
def test_command_that_found_no_queue_says_so_and_ends_with_1(
    run: Run, tmp_path: Path, command: str, made: str
) -> None:
    if made == "a directory":
        (tmp_path / "spool").mkdir()
    elif made == "a file":
        (tmp_path / "spool").touch()
    result = run(*command.split())
    assert (result.exit_code, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("no relay answers at s")
    assert command == "health" or "and its queue cannot be read: " in line


@pytest.mark.needs("root")
@pytest.mark.usefixtures("stopped_queue")
@pytest.mark.parametrize(
    ("closed", "said"),
    [
        ("relay.yaml", "relay.yaml: permission denied; run this as root, or join the group mail"),
        ("spool", "queue directory spool: Permission denied; run this as root, or join the gr"),
    ],
)
def test_a_user_without_rights_hears_so_in_a_sentence(
    run: Run, tmp_path: Path, closed: str, said: str
) -> None:
    commands = ("queue list", "log", "health")
    for command in commands:
        run(*command.split())  # imports what it needs while all files may be read
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    (tmp_path / "relay.yaml").chmod(0o644)
    tmp_path.chmod(0o755)
    shutil.chown(tmp_path / closed, group="mail")
    (tmp_path / closed).chmod(0o770)
    os.seteuid(65534)
    try:
        results = [run(*command.split()) for command in commands]
    finally:
        os.seteuid(0)
    for result in results:
        assert (result.exit_code, result.stdout) == (1, "")
        [line] = result.stderr.splitlines()
        assert said in line or (closed == "spool" and line == "no relay answers at s")


EVENT = {
    "timestamp": 0,
    "event": "failed",
    "severity": "temporary",
    "queue-id": "M1",
    "envelope": {"sender": "a@example.com", "targets": "b@example.net"},
    "policy": {"require-tls": False, "skip-verification": False},
}
STATUS = {
    "tls": False,
    "certificate-verified": False,
    "mx-host": "mx.example.net",
    "code": 0,
    "description": "",
    "message": "",
    "enhanced-code": "4.7.5",
}


@pytest.mark.parametrize(
    ("event", "status", "said"),
    [
        (
            {"policy": {"require-tls": True}},
            {"description": "mx.example.net: certificate has expired"},
            "not sent: TLS required, certificate has expired (mx.example.net, 4.7.5)",
        ),
        (
            {},
            {"tls": True, "description": "certificate has expired"},
            "not sent: TLS required, certificate has expired (mx.example.net, 4.7.5)",
        ),
        (
            {"severity": "permanent"},
            {"code": 454, "enhanced-code": "5.7.4", "message": "no TLS now"},
            "not sent: TLS required, no TLS now (mx.example.net, 5.7.4)",
        ),
        (
            {"policy": {"require-tls": True}, "severity": "permanent"},
            {
                "code": 602,
                "last-code": 0,
                "enhanced-code": "5.7.5",
                "message": "Too old",
                "description": "given up after 5 days: mx.example.net [192.0.2.1]: "
                "certificate not verified: certificate has expired",
            },
            "not sent: TLS required, certificate has expired (mx.example.net, 5.7.5)",
        ),
        (
            {"policy": {"require-tls": True}},
            {"code": 680, "enhanced-code": "4.4.1", "description": "refused"},
            "not sent: 680 4.4.1 refused (mx.example.net)",
        ),
        (
            {},
            {"code": 450, "enhanced-code": "4.2.1", "message": "busy"},
            "not sent: 450 4.2.1 busy (mx.example.net)",
        ),
        (
            {"event": "delivered", "severity": ""},
            {"code": 250, "enhanced-code": "2.0.0", "tls": True},
            "TLS unverified, mx.example.net: 250 2.0.0",
        ),
        (
            {"event": "delivered", "severity": ""},
            {
                "code": 250,
                "enhanced-code": "2.0.0",
                "downgrade": {
                    "reason": "starttls-not-offered",
                    "error": "STARTTLS not offered",
                    "from": "verified",
                },
            },
            "in clear (STARTTLS not offered), mx.example.net: 250 2.0.0",
        ),
        (
            {"event": "delivered"},
            {"code": 250, "enhanced-code": "2.0.0", "tls": True, "memory": {"before": "verified"}},
            "TLS unverified, verified before, mx.example.net: 250 2.0.0",
        ),
        *(
            (
                {"policy": {"require-tls": require_tls, "requiretls": held == "by REQUIRETLS"}},
                {"tls": None, "mx-host": None, "description": f"mx.x.test [192.0.2.1]: {why}"}
                | more,
                f"not sent: {said}, {why} (mx.x.test [192.0.2.1], 4.7.5)",
            )
            for require_tls, held, more, why in (
                (True, "", {"policy-type": "sts", "policy-mode": "enforce"}, "not connected to: x"),
                (False, "by MTA-STS", {"policy-type": "sts", "policy-mode": "enforce"}, "bad"),
                (False, "by DANE", {"policy-type": "tlsa", "policy-mode": "enforce"}, "bad"),
                (False, "by REQUIRETLS", {"policy-type": "no-policy-found"}, "bad"),
                (False, "by downgrade_memory", {"memory": {"before": "verified"}}, "bad"),
                (
                    False,
                    "by a pin",
                    {"policy-type": "sts", "policy-mode": None},
                    "not connected to: it is none of the hosts that the configuration allows for"
                    " this domain: mx.y.test",
                ),
            )
            for said in ["TLS required" if require_tls else f"held {held}"]
        ),
        (
            {"event": "delivered", "severity": ""},
            {"code": 250, "enhanced-code": "2.0.0", "waived": "tls-required-no"},
            "in clear, waived: TLS-Required: No, mx.example.net: 250 2.0.0",
        ),
        (
            {"policy": {"require-tls": True}},
            {"tls": None, "mx-host": None, "code": 498, "enhanced-code": "4.4.4"},
            "not sent: 498 4.4.4",
        ),
        (
            {"policy": {"require-tls": True}},
            {"code": 450, "enhanced-code": "4.3.2", "message": "busy"},
            "not sent: 450 4.3.2 busy (mx.example.net)",
        ),
    ],
)
def test_the_log_says_that_a_message_was_not_sent(
    event: dict[str, Any], status: dict[str, Any], said: str
) -> None:
    assert said in _for_people({**EVENT, **event, "delivery-status": {**STATUS, **status}})


def test_line_of_the_log_names_the_node_where_several_share_the_queue() -> None:
    event = {**EVENT, "policy": {"require-tls": True}, "delivery-status": STATUS}
    assert _for_people({**event, "node": "mx-a"}) == f"{_for_people(event)}  at mx-a"


def test_a_line_of_the_log_is_folded_where_the_terminal_is_narrow() -> None:
    status = {"description": "mx.example.net [192.0.2.1]: certificate not verified: it has expired"}
    event = {**EVENT, "policy": {"require-tls": True}, "delivery-status": {**STATUS, **status}}
    lines = _for_people(event, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines[1:]] == [
        "a@example.com → b@example.net",
        "not sent: TLS required, it has expired (mx.example.net, 4.7.5)",
    ]
    assert datetime.fromisoformat(lines[0].split("  ")[0]).timestamp() == 0


@pytest.mark.usefixtures("stopped_queue")
def test_the_queue_of_a_stopped_relay_can_be_looked_at(run: Run) -> None:
    found = json.loads(run("queue", "list", "--json").stdout)
    assert [item["queue-id"] for item in found] == ["M1", "M2"]
    assert set(found[0]) == {"queue-id", "state", "sender", "size", "arrived", "recipients"}
    assert set(found[0]["recipients"][0]) == {
        "address",
        "state",
        "attempts",
        "next-attempt",
        "last",
    }
    text = run("queue", "list").stdout
    assert "M1  queued  2h  37 B  from a@example.com\n    to b@example.net  queued" in text
    assert text.endswith("2 messages\n")
    assert [
        i["queue-id"] for i in json.loads(run("queue", "list", "--sender", "<>", "--json").stdout)
    ] == ["M2"]
    assert (
        json.loads(run("queue", "list", "--domain", "Example.ORG.", "--json").stdout)[0]["queue-id"]
        == "M2"
    )


@pytest.mark.usefixtures("stopped_queue")
def test_a_message_is_shown_and_nothing_in_it_moves_the_cursor(run: Run) -> None:
    result = run("queue", "show", "M1")
    assert result.exit_code == 0
    assert "require-tls: true, by domain example.com" in result.stdout
    assert "Subject: hello\n" in result.stdout
    assert "\x1b[2J" not in result.stdout
    assert json.loads(run("queue", "show", "M1", "--json").stdout)["queue-id"] == "M1"


@pytest.mark.usefixtures("stopped_queue")
def test_an_unknown_queue_id_ends_with_1(run: Run) -> None:
    result = run("queue", "show", "M9")
    assert result.exit_code == 1
    assert result.stderr == "M9: no such message in the queue\n"


@pytest.mark.usefixtures("stopped_queue")
def test_the_queue_of_a_stopped_relay_cannot_be_changed(run: Run) -> None:
    result = run("queue", "hold", "--all")
    assert result.exit_code == 1
    assert "no relay answers at s; start one with `relay serve`" in result.stderr


@pytest.mark.usefixtures("stopped_queue")
def test_a_report_of_a_stopped_relay_says_what_was_accepted_under_which_rule(run: Run) -> None:
    shown = run("report", "--recipient-domain", "EXAMPLE.NET", "--since", "1d").stdout
    assert "Mail from all domains to example.net\n" in shown
    assert "require_tls: true (domain example.com)" in shown
    told = json.loads(run("report", "--sender-domain", "example.com", "--json").stdout)
    assert {one["result"] for one in told["counts"]} == {"accepted"}
    assert told["exceptions"] == []
    table = list(csv.DictReader(io.StringIO(run("report", "--csv").stdout)))
    accepted = sum(one["number"] for one in told["counts"])
    assert [(row["kind"], row["number"]) for row in table] == [("count", "3")]
    assert accepted == 1  # the other message has the null reverse-path
    assert (
        "No mail in this period"
        in run("report", "--until", "2020-01-31", "--since", "2020-01-01").stdout
    )
    assert run("report", "--csv", "--json").exit_code == 2


@pytest.mark.usefixtures("stopped_queue")
def test_the_log_of_a_stopped_relay_can_be_read(run: Run) -> None:
    lines = [json.loads(line) for line in run("log", "--json").stdout.splitlines()]
    assert [line["queue-id"] for line in lines] == ["M1", "M2"]
    assert "accepted   M1  a@example.com → b@example.net" in run("log", "--id", "M1").stdout
    assert run("log", "--event", "failed").stdout == ""
    assert run("log", "--since", "1h").stdout == ""
    assert run("log", "--until", "2020-01-31").stdout == ""
    assert run("log", "--recipient-domain", "EXAMPLE.net").stdout
    assert run("log", "--sender-domain", "example.org").stdout == ""
    assert len(run("log", "--since", "1d").stdout.splitlines()) == 2


@pytest.mark.parametrize("command", [["list"], ["show", "a.example"], ["refresh", "a.example"]])
def test_only_a_running_relay_has_mta_sts_policies(run: Run, command: list[str]) -> None:
    result = run("mta-sts", *command)
    assert result.exit_code == 1
    assert "no relay answers at s" in result.stderr


@pytest.mark.parametrize(
    "command",
    ["probe", "memory list", "memory forget", "mta-sts show", "mta-sts forget", "tls-report show"],
)
def test_a_name_that_is_no_domain_is_refused_by_every_command_alike(run: Run, command: str) -> None:
    result = run(*command.split(), "a b")
    assert result.exit_code == 2
    assert "a b: the domain is not a domain name" in result.stderr
    empty = run(*command.split(), "")
    assert empty.exit_code == 2
    assert "is empty" in empty.stderr


@pytest.mark.parametrize(
    ("command", "lines", "said"),
    [
        ("mta_sts list", [{"done": {}}], "No policy is kept.\n"),
        ("mta_sts forget a.example", [{"done": {"unknown": []}}], "forgotten: the policy of a.ex"),
        ("tls_report list", [{"done": {"unknown": []}}], "No session is counted.\n"),
        ("tls_report send", [{"done": {"unknown": []}}], "No report was left to send.\n"),
        (
            "tls_report send a.example",
            [
                {
                    "item": {
                        "day": "2030-01-30",
                        "domain": "a.example",
                        "state": "sent",
                        "reason": "",
                        "was-settled": True,
                    }
                },
                {"done": {"unknown": []}},
            ],
            "2030-01-30 sent       a.example  (so before; nothing was sent now)\n",
        ),
    ],
)
def test_a_command_that_did_nothing_or_succeeded_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, lines: list[dict[str, Any]], said: str
) -> None:
    group, *words = command.split()
    monkeypatch.setattr("relay.cli.common.answers", lambda *_, **__: iter(lines))
    result = run(group.replace("_", "-"), *words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(said)


def _listed(day: str, domain: str, state: str) -> dict[str, Any]:
    due = "2030-02-01T03:00:00+00:00" if state == "due" else None
    counts = {"successful": 3, "failed": 1}
    return {"day": day, "domain": domain, "state": state, "due": due, **counts}


POLICY = {
    "domain": "a.example",
    "mode": "enforce",
    "mx": ["mx.a.example"],
    "id": "1",
    "fetched": "2030-01-31T00:00:00+00:00",
    "expires": "2099-01-31T00:00:00+00:00",
    "refresh-at": "2030-02-01T00:00:00+00:00",
}
REPORTS = [
    _listed("2030-01-31", "a.example", "so-far"),
    _listed("2030-01-30", "a.example", "due"),
    _listed("2030-01-30", "b.example", "due"),
    _listed("2030-01-30", "c.example", "sent"),
    _listed("2030-01-29", "a.example", "due"),
]


@pytest.mark.parametrize(
    ("command", "item", "asked", "shown"),
    [
        ("mta_sts forget a.example", {"item": POLICY}, "mta-sts-show", ["domain:   a.example"]),
        (
            "tls_report send",
            {"items": REPORTS},
            "tls-report-list",
            ["2030-01-30 due        a.", "2030-01-30 due        b.", "2030-01-29 due        a."],
        ),
        (
            "tls_report send A.example",
            {"items": REPORTS},
            "tls-report-list",
            ["2030-01-30 due        a.", "2030-01-29 due        a."],
        ),
        (
            "tls_report send --day 2030-01-30",
            {"items": REPORTS},
            "tls-report-list",
            ["2030-01-30 due        a.", "2030-01-30 due        b."],
        ),
    ],
)
def test_dry_run_shows_what_is_meant_and_asks_for_no_change(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    item: dict[str, Any],
    asked: str,
    shown: list[str],
) -> None:
    verbs = []

    def answers(_config: object, request: dict[str, Any], **_: object) -> Iterator[dict[str, Any]]:
        verbs.append(request["verb"])
        return iter([item, {"done": {"unknown": [], "reason": ""}}])

    group, *words = command.split()
    monkeypatch.setattr("relay.cli.common.answers", answers)
    result = run(group.replace("_", "-"), *words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert verbs == [asked]
    *lines, last = result.stdout.splitlines()
    assert last in ("Nothing was forgotten.", "Nothing was sent.")
    assert len(lines) == len(shown) or group == "mta_sts"
    assert all(line.startswith(begin) for line, begin in zip(lines, shown, strict=False))


def test_a_policy_that_is_announced_and_not_fetched_is_told_from_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reason, said in (("", ""), ("why", "; the domain announces one, and the last fetch fai")):
        done = {"done": {"unknown": ["a.example"], "reason": reason}}
        monkeypatch.setattr("relay.cli.common.answers", lambda *_, done=done, **__: iter([done]))
        result = run("mta-sts", "show", "a.example")
        assert result.exit_code == 1
        assert f"a.example: no policy is kept{said}" in result.stderr
        assert ("why" in result.stderr) == bool(reason)


# --- the queue of a running relay -----------------------------------------------------------------


@pytest.mark.usefixtures("running_queue")
def test_commands_ask_and_change_a_running_relay(run: Run) -> None:
    assert len(json.loads(run("queue", "list", "--json").stdout)) == 2
    assert run("queue", "hold", "M1").stdout == "hold: 1 recipient\n"
    assert [
        i["queue-id"] for i in json.loads(run("queue", "list", "--state", "held", "--json").stdout)
    ] == ["M1"]
    assert run("queue", "release", "--state", "held").stdout == "release: 1 recipient\n"
    assert run("queue", "retry", "--older-than", "1h").stdout == "retry: 3 recipients\n"
    for verb in ("retry", "hold", "release", "remove"):
        dry = run("queue", verb, "--domain", "example.org", "--dry-run").stdout
        assert dry.startswith("M2  ")
        assert dry.endswith("1 message\nNothing was changed.\n")
    partly = run("queue", "remove", "M1", "M9")
    assert partly.exit_code == 1
    assert partly.stdout == "remove: 1 recipient\n"
    assert partly.stderr == "M9: no such message in the queue\n"
    unasked = run("queue", "remove", "--all")
    assert unasked.exit_code == 2
    assert "where nobody can answer, say --yes" in unasked.stderr
    assert run("queue", "remove", "--all", "--yes").stdout == "remove: 2 recipients\n"
    assert run("queue", "list").stdout.startswith("The queue is empty")
    assert "failed     M1" in run("log", "--event", "failed").stdout


HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaOBGJ"


# --- explain --------------------------------------------------------------------------------------


def test_explain_says_where_a_setting_came_from_and_what_a_host_must_prove(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "relay.yaml").write_text(
        """
        hostname: relay.example.net
        policy: {destinations: {partner.example: {require_tls: true, allow_override: false}}}
        routes: {partner.example: {host: 192.0.2.7, port: 26}}
        """
    )
    asked = ("explain", "--from", "a@example.com", "--to", "b@Partner.example")
    result = run(*asked, "--require-tls", "no", "--skip-verification", "no")
    assert result.exit_code == 0, result.output
    assert "require-tls:       yes  from: message-refused (partner.example)" in result.stdout
    assert "the host must offer TLS" in result.stdout
    assert "1. 192.0.2.7 [192.0.2.7]:26" in result.stdout
    answer = json.loads(run(*asked, "--json").stdout)
    assert answer["policy"]["require-tls"] == {
        "value": True,
        "source": "destination",
        "rule": "partner.example",
    }
    assert answer["hosts"][0]["address"] == "192.0.2.7"


def test_explain_says_which_next_hop_a_sender_and_a_client_have(run: Run, tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text(
        f"""
        hostname: relay.example.net
        listeners: [{{address: "127.0.0.1:2525", next_hop: second}}]
        access: {{users: {{app1: {{password: "{HASH}", next_hop: first}}}}}}
        next_hops:
          first: {{host: 192.0.2.1}}
          second: {{host: 192.0.2.2}}
          third: {{host: 192.0.2.3}}
        routes: {{"*": first}}
        routes_by_sender: {{bot@example.com: {{next_hop: third}}}}
        """
    )
    for options, name, rule in [
        ((), "third", "sender"),
        (("--user", "app1"), "first", "client"),
        (("--listener", "127.0.0.1:2525"), "second", "client"),
        (("--listener", "127.0.0.1:2525", "--user", "app1"), "first", "client"),
    ]:
        asked = ("explain", "--from", "bot@example.com", "--to", "b@example.net", *options)
        answer = json.loads(run(*asked, "--json").stdout)
        assert (answer["route"]["next-hop"], answer["route"]["rule"]) == (name, rule)
        assert f"next hop:          {name}  from: {answer['route']['text']}" in run(*asked).stdout
        if rule == "client":
            whose = "user app1" if "--user" in options else "listener 127.0.0.1:2525"
            assert answer["route"]["text"] == f"next_hop of the {whose}"
    unknown = run("explain", "--from", "<>", "--to", "b@example.net", "--user", "x")
    assert unknown.exit_code == 2
    assert "access.users has no x" in unknown.stderr


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("mechanism: plain, username: u, password_file: FILE", "as u by PLAIN"),
        ("username: u, password_file: FILE", "as u by PLAIN or LOGIN"),
        ("username: u, oauth2: t", "as u by OAUTHBEARER or XOAUTH2"),
    ],
)
def test_explain_says_who_logs_in_at_the_next_hop_and_how(
    run: Run, tmp_path: Path, keys: str, said: str
) -> None:
    (tmp_path / "secret").write_text("open sesame")
    (tmp_path / "relay.yaml").write_text(
        f"""
        hostname: relay.example.net
        next_hops: {{first: {{host: 192.0.2.1, auth: {{{keys}}}}}}}
        routes: {{"*": first}}
        oauth2:
          t: {{grant: client_credentials, token_url: "https://a.example/", client_id: i,
               client_secret_file: FILE}}
        delivery: {{allow_networks: [192.0.2.0/24]}}
        """.replace("FILE", str(tmp_path / "secret"))
    )
    result = run("explain", "--from", "a@example.com", "--to", "b@example.net")
    assert f"  with login {said}\n" in result.stdout, result.stderr
    assert "sesame" not in result.stdout


def test_explain_ends_with_1_where_there_is_no_host(run: Run) -> None:
    result = run("explain", "--from", "<>", "--to", "b@[127.0.0.1]")
    assert result.exit_code == 1
    assert "no host to try: bounced, 5.4.4" in result.stdout


# --- route ----------------------------------------------------------------------------------------

ROUTES = f"""
hostname: relay.example.net
listeners: [{{address: "127.0.0.1:2525", next_hop: second}}]
access: {{users: {{app1: {{password: "{HASH}", next_hop: first}}}}}}
next_hops:
  first:
    hosts: [[a.example, b.example], c.example]
    port: 587
    auth: {{username: relay@example.com, password_file: FILE}}
    rate: 30/m
    max_connections: 3
  second: {{host: 192.0.2.2}}
  unused: {{host: 192.0.2.3}}
routes:
  "*": first
  "*.example.org": second
  "*.deep.example.org": second
  in.place.example: {{host: h.example, port: 26}}
routes_by_sender: {{example.com: first, bot@example.com: {{next_hop: second}}}}
"""


@pytest.fixture
def routes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame")
    text = ROUTES.replace("FILE", str(tmp_path / "secret"))
    (tmp_path / "relay.yaml").write_text(text)


def test_route_list_says_where_each_rule_leads_in_the_order_of_precedence(
    run: Run, routes: None
) -> None:
    found = [tuple(one.values()) for one in json.loads(run("route", "list", "--json").stdout)]
    assert found == [
        ("recipient", "in.place.example", "in.place.example"),
        ("recipient", "*.deep.example.org", "second"),
        ("recipient", "*.example.org", "second"),
        ("user", "app1", "first"),
        ("listener", "127.0.0.1:2525", "second"),
        ("sender", "bot@example.com", "second"),
        ("sender", "example.com", "first"),
        ("recipient", "*", "first"),
    ]
    lines = run("route", "list").stdout.splitlines()
    assert lines[0].split("  ")[-1] == "in.place.example: h.example, port 26"
    assert lines[-2].endswith(
        "first: a.example, b.example; then c.example, port 587, login as relay@example.com"
    )
    assert lines[-1].split("  ")[0] == "otherwise"


def test_route_show_has_the_keys_of_a_next_hop_and_no_secret(
    run: Run, routes: None, tmp_path: Path
) -> None:
    answer = json.loads(run("route", "show", "first", "--json").stdout)
    assert answer["keys"] == {
        "hosts": [["a.example", "b.example"], "c.example"],
        "port": 587,
        "auth": {
            "mechanism": "auto",
            "username": "relay@example.com",
            "password_file": str(tmp_path / "secret"),
        },
        "max_connections": 3,
        "rate": "30/m",
    }
    assert {(one["rule"], one["pattern"]) for one in answer["taken-by"]} == {
        ("user", "app1"),
        ("sender", "example.com"),
        ("recipient", "*"),
    }
    text = run("route", "show", "first").stdout
    assert yaml.safe_load(text) == {"first": answer["keys"]}
    assert "# user app1" in text
    assert "open sesame" not in text
    assert "# recipient in.place.example" in run("route", "show", "in.place.example").stdout
    assert "# nothing leads to it" in run("route", "show", "unused").stdout


def test_route_show_of_an_unknown_name_says_which_there_are(run: Run, routes: None) -> None:
    result = run("route", "show", "frist")
    assert result.exit_code == 1
    assert "no next hop is called frist: there is first, second, in.place.example" in result.stderr


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "text"),
    [
        (0, "0s"),
        (-5, "0s"),
        (59, "59s"),
        (90, "90s"),
        (120, "2m"),
        (7300, "2h"),
        (86400, "1d"),
        (200_000, "2d"),
    ],
)
def test_an_age_is_told_in_one_unit(age: int, text: str) -> None:
    assert age_text(timedelta(seconds=age)) == text


def test_a_size_is_told_in_one_unit() -> None:
    assert [size_text(n) for n in (42, 2048, 5 * 1024**2)] == ["42 B", "2 KiB", "5 MiB"]


def test_a_strangers_text_is_made_harmless() -> None:
    assert printable("a\x1b[2J\r\n\u202eb") == "a\\x1b[2J\\r\\n\\u202eb"


@pytest.mark.parametrize(
    ("command", "slow"),
    [
        ("--help", {"pydantic", "yaml", "dns", "cryptography", "aiohttp"}),
        ("queue list", {"dns", "cryptography", "aiohttp", "jinja2"}),
        ("check", {"cryptography", "aiohttp", "jinja2"}),
    ],
)
def test_short_command_imports_nothing_slow_that_it_does_not_need(
    command: str, slow: set[str], tmp_path: Path
) -> None:
    (tmp_path / "relay.yaml").write_text("queue: {path: spool}")
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('modules', *sys.modules))\n"
        "from relay.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split(), "-c", "relay.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    imported = set(done.stdout.rpartition("modules ")[2].split())
    assert "relay.cli" in imported, done.stderr
    assert not slow & imported
