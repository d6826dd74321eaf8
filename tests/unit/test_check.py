"""`relay check`, `relay dkim-key`, the manual page: what is told before a relay runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import jsonschema_rs
import pytest
import trustme
import yaml
from click.testing import CliRunner

from relay.cli import relay
from relay.cli.manual import each_command, man_page, man_page_of_file
from relay.config import read
from relay.config.schema import json_schema
from relay.config.unit import beyond_unit, read_settings
from tests.rigs.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(directory: Path, *arguments: str) -> Done:
    """A command of `relay`, run in a directory."""
    with contextlib.chdir(directory):
        result = CliRunner().invoke(relay, arguments, prog_name="relay")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


class Checked:
    """A configuration in a directory of its own, checked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = {
            "hostname": "relay.test.example",
            "listeners": [{"address": f"127.0.0.1:{free_port()}"}],
            "admin": {"socket": "relay.sock", "http": f"127.0.0.1:{free_port()}"},
            "queue": {"path": "spool"},
            "log": {"delivery": "log/delivery.log"},
            "resolver": {"nameservers": [self._silent_name_server()], "timeout": "300ms"},
        }

    def _silent_name_server(self) -> str:
        self.silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.silent.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{self.silent.getsockname()[1]}"

    def run(self, *arguments: str) -> Done:
        (self.directory / "relay.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        return run(self.directory, "check", "-c", "relay.yaml", *arguments)


@pytest.fixture
def checked(tmp_path: Path) -> Iterator[Checked]:
    found = Checked(tmp_path)
    yield found
    found.silent.close()


def test_check_of_a_healthy_machine_reports_only_its_name_server(checked: Checked) -> None:
    done = checked.run()
    assert done.returncode == 0, done.stderr
    warning, *more = done.stderr.splitlines()
    assert warning.startswith("warning: relay.yaml:")
    assert "resolver.nameservers: 127.0.0.1:" in warning
    assert "until then mail waits in the queue" in warning
    assert not more
    assert sorted(path.name for path in checked.directory.iterdir()) == ["relay.yaml"], (
        "nothing is left behind"
    )


def test_a_taken_port_is_found_with_its_line_and_a_cure(checked: Checked) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        checked.config["listeners"].append({"address": f"127.0.0.1:{port}"})
        done = checked.run()
        assert done.returncode == 1
        [mistake] = done.stderr.splitlines()
        assert mistake.startswith("relay.yaml:4: listeners.1.address: ")
        assert f"127.0.0.1:{port}: address already in use; stop what listens there" in mistake
        assert checked.run("--file-only").returncode == 0


def test_an_address_this_machine_does_not_have_is_found(checked: Checked) -> None:
    checked.config["admin"]["http"] = "192.0.2.77:8025"
    checked.config["admin"]["api_keys"] = ["key"]
    assert (
        "192.0.2.77:8025: cannot assign requested address; write an address" in checked.run().stderr
    )


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("queue", "path", "/proc/spool"),
        ("log", "delivery", "/proc/log/delivery.log"),
        ("admin", "socket", "/proc/relay.sock"),
    ],
)
def test_a_directory_that_cannot_be_written_is_found(
    checked: Checked, section: str, name: str, value: str
) -> None:
    checked.config[section][name] = value
    done = checked.run()
    assert done.returncode == 1
    assert f": {section}.{name}: /proc: " in done.stderr
    assert "let the relay's user write in /proc" in done.stderr


def test_all_that_a_start_would_find_is_found_at_once(checked: Checked) -> None:
    checked.config["queue"]["path"] = "/proc/spool"
    checked.config["log"]["delivery"] = "/proc/delivery.log"
    assert len(checked.run().stderr.splitlines()) == 2


def test_a_key_that_does_not_match_its_certificate_is_found(checked: Checked) -> None:
    authority, directory = trustme.CA(), checked.directory
    authority.issue_cert("a.example").cert_chain_pems[0].write_to_path(str(directory / "tls.pem"))
    authority.issue_cert("b.example").private_key_pem.write_to_path(str(directory / "tls.key"))
    checked.config["listeners"][0] |= {
        "tls": "starttls",
        "certificate": "tls.pem",
        "key": "tls.key",
    }
    done = checked.run()
    assert done.returncode == 1
    assert (
        "listeners.0.certificate: tls.pem cannot be used: tls.key is another certificate's key;"
    ) in done.stderr
    (directory / "tls.key").unlink()
    assert "listeners.0.key: tls.key: No such file" in checked.run().stderr


def test_a_certificate_that_has_expired_is_found(checked: Checked) -> None:
    authority, directory = trustme.CA(), checked.directory
    yesterday = datetime.now(UTC) - timedelta(days=1)
    made = authority.issue_cert("a.example", not_after=yesterday)
    made.private_key_and_cert_chain_pem.write_to_path(str(directory / "tls.pem"))
    checked.config["listeners"][0] |= {"tls": "starttls", "certificate": "tls.pem"}
    done = checked.run()
    assert done.returncode == 1
    said = f"listeners.0.certificate: tls.pem: expired on {yesterday:%Y-%m-%d}; renew it"
    assert said in done.stderr
    assert checked.run("--file-only").returncode == 0, "old TLS beats none: a start is not refused"


def test_the_delivery_log_may_be_the_standard_output(checked: Checked) -> None:
    checked.config["log"]["delivery"] = "/dev/stdout"
    assert checked.run().returncode == 0


def test_a_queue_that_another_relay_uses_is_found(checked: Checked) -> None:
    (checked.directory / "spool").mkdir()
    with (checked.directory / "spool/lock").open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = checked.run()
    assert done.returncode == 1
    assert "queue.path: spool: " in done.stderr
    assert "4711 uses this queue already; stop that one" in done.stderr
    assert checked.run().returncode == 0


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("private", "said"),
    [
        ("relay.yaml", "relay.yaml: permission denied; let the relay's user read it"),
        (
            "tls.pem",
            "listeners.0.certificate: tls.pem: Permission denied; correct the path, or let",
        ),
        ("spool/queue.db", "queue.path: spool/queue.db: nobody may not write it; give it to the"),
        ("log/delivery.log", "log.delivery: log/delivery.log: nobody may not write it; give it"),
        ("log", "log.delivery: log: permission denied; let the relay's user write in log"),
        ("", ""),
    ],
)
def test_root_checks_with_the_rights_of_the_services_user(
    checked: Checked, private: str, said: str
) -> None:
    directory = checked.directory
    checked.run()  # imports what it needs while all files may be read
    made = trustme.CA().issue_cert("a.example")
    made.private_key_and_cert_chain_pem.write_to_path(str(directory / "tls.pem"))
    checked.config["listeners"][0] |= {"tls": "starttls", "certificate": "tls.pem"}
    checked.config["listeners"].append({"address": "127.0.0.125:25"})  # for which it has a right
    for name in ("spool/lock", "spool/queue.db", "log/delivery.log", "relay.yaml"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()
    checked.run()
    for path in (directory, *directory.rglob("*")):
        shutil.chown(path, "nobody")
    for parent in directory.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    if private:
        shutil.chown(directory / private, "root")
        (directory / private).chmod(0o700)
    done = run(directory, "check", "-c", "relay.yaml", "--user", "nobody")
    assert done.returncode == (1 if private else 0), done.stderr
    assert said in done.stderr
    assert run(directory, "check", "-c", "relay.yaml").returncode == 0, "root may do all of it"


UNIT = """\
LoadState=loaded
ProtectHome=yes
ProtectSystem=strict
ReadWritePaths=/srv/relay-spool
StateDirectory=relay
LogsDirectory=relay
RuntimeDirectory=relay
"""


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("queue: {path: /var/lib/relay/spool}", ""),
        ("queue: {path: /srv/relay-spool}", ""),
        (
            "queue: {path: /srv/other}",
            "queue.path: /srv/other: relay.service may not write there (ProtectSystem=strict);"
            " `systemctl edit relay.service`, and write [Service] and ReadWritePaths=/srv/other",
        ),
        ("queue: {url: 'postgresql://relay@db.example/relay'}", ""),
        ("log: {delivery: /dev/stdout}", ""),
        ("log: {delivery: /var/log/mail/d.log}", "log.delivery: /var/log/mail: relay.service may"),
        ("admin: {socket: /srv/s/r.sock}", "admin.socket: /srv/s: relay.service may not write"),
        ("listeners: [{address: 'unix:/srv/s/smtp'}]", "listeners.0.address: /srv/s: relay.serv"),
        ("tls: {ca_file: /etc/ssl/ca.pem}", ""),
        (
            "tls: {ca_file: /home/ann/ca.pem}",
            "tls.ca_file: /home/ann/ca.pem: relay.service sees nothing of it (ProtectHome=);"
            " name a place outside of home directories",
        ),
        ("queue: {path: /root/spool}", "queue.path: /root/spool: relay.service sees nothing of"),
    ],
)
def test_path_that_the_unit_keeps_from_the_service_is_named(keys: str, said: str) -> None:
    places = "queue: {path: /var/lib/relay/spool}\nlog: {delivery: /var/log/relay/delivery.log}\n"
    places += "admin: {socket: /run/relay/relay.sock}\n"
    document = yaml.safe_load(places) | yaml.safe_load(keys)
    config = read(yaml.safe_dump(document), {}, source="relay.yaml", look=None)
    found = [
        f"{one.key}: {one.problem}; {one.cure}" for one in beyond_unit(config, read_settings(UNIT))
    ]
    assert len(found) == (1 if said else 0)
    assert "".join(found).startswith(said)


def test_without_the_unit_no_path_is_kept_from_the_service() -> None:
    config = read("queue: {path: /root/spool}", {}, source="relay.yaml", look=None)
    for shown in ("", "Failed to connect to bus", UNIT.replace("loaded", "not-found")):
        assert list(beyond_unit(config, read_settings(shown))) == []


def test_only_root_judges_as_another_user_and_only_as_one_there_is(checked: Checked) -> None:
    assert "no user nosuch" in checked.run("--user", "nosuch").stderr


def test_a_key_for_signatures_is_made_checked_and_published(checked: Checked) -> None:
    directory = checked.directory
    made = run(directory, "dkim-key", "Example.com", "--selector", "s1", "--out", "dkim.pem")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("s1._domainkey.example.com. IN TXT (")
    checked.config["dkim"] = {
        "domains": {"example.com": {"selector": "s1", "key_file": "dkim.pem"}}
    }
    assert checked.run("--file-only").returncode == 0
    assert run(directory, "dkim-key", "example.com", "--out", "dkim.pem").returncode == 1, (
        "not written over"
    )
    (directory / "dkim.pem").write_text("no key")
    done = checked.run("--file-only")
    assert done.returncode == 1
    assert (
        "dkim.domains.example.com.key_file: dkim.pem: not an unencrypted private key" in done.stderr
    )
    checked.config["dkim"]["domains"]["example.com"]["selector"] = "s 1"
    assert '"s 1" is not a selector' in checked.run("--file-only").stderr


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("owner", "mode", "expected"),
    [
        ((0, 62525), 0o750, (0, 62525, 0o640)),  # /etc/relay/dkim, as relay.tmpfiles makes it
        ((62525, 62525), 0o700, (62525, 62525, 0o600)),
        ((0, 0), 0o755, (0, 0, 0o600)),
        ((0, 62525), 0o700, (0, 62525, 0o600)),
    ],
)
def test_key_made_by_root_may_be_read_by_the_owner_of_its_directory(
    tmp_path: Path, owner: tuple[int, int], mode: int, expected: tuple[int, int, int]
) -> None:
    directory = tmp_path / "dkim"
    directory.mkdir()
    os.chown(directory, *owner)
    directory.chmod(mode)
    made = run(tmp_path, "dkim-key", "example.com", "--out", "dkim/example.com.pem")
    assert made.returncode == 0, made.stderr
    found = (directory / "example.com.pem").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == expected


# --- schema ---------------------------------------------------------------------------------------


def test_the_schema_takes_the_reference_and_what_check_prints(checked: Checked) -> None:
    schema = json_schema()
    jsonschema_rs.meta.validate(schema)
    jsonschema_rs.validate(schema, yaml.safe_load((ROOT / "conf/relay.yaml").read_text()))
    jsonschema_rs.validate(schema, yaml.safe_load(checked.run("--file-only").stdout))
    assert json.loads(run(checked.directory, "check", "--schema").stdout) == schema


@pytest.mark.parametrize(
    "wrong",
    [
        {"hostnme": "a.example"},
        {"limits": {"idle": 5}},
        {"limits": {"message_size": "many"}},
        {"listeners": [{"tls": "starttls"}]},
        {"listeners": [{"address": "127.0.0.1:25", "tls": "perhaps"}]},
        {"policy": {"default": {"require_tls": "maybe"}}},
        {"routes": {"a.example": {"hots": "b.example"}}},
    ],
)
def test_the_schema_marks_what_check_would_refuse(wrong: dict[str, Any]) -> None:
    assert not jsonschema_rs.is_valid(json_schema(), wrong)


# --- manual, completion, version ------------------------------------------------------------------


def all_commands() -> list[str]:
    return [
        context.command_path
        for context in each_command(click.Context(relay, info_name="relay"))
        if not isinstance(context.command, click.Group)
    ]


def test_every_command_and_option_is_in_the_manual() -> None:
    page = man_page().replace("\\-", "-")
    assert {"relay serve", "relay check", "relay queue list", "relay queue remove"} <= set(
        all_commands()
    )
    for name in all_commands():
        assert f"\n.SS {name}\n" in page
    assert "--recipient ADDRESS" in page


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", ["relay.1", "relay.yaml.5"])
def test_the_manual_is_fit_to_print(tmp_path: Path, name: str) -> None:
    reference = (ROOT / "conf/relay.yaml").read_text()
    page = man_page() if name == "relay.1" else man_page_of_file(reference)
    (tmp_path / name).write_text(page)
    shown = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_commands(tmp_path: Path, shell: str) -> None:
    script = run(tmp_path, "completion", shell)
    assert script.returncode == 0, script.stderr
    assert "_RELAY_COMPLETE" in script.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script.stdout, text=True, check=True)


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    asked = {"_RELAY_COMPLETE": "bash_complete", "COMP_WORDS": "relay queue re", "COMP_CWORD": "2"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'relay'; from relay.cli import main; main()",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **asked},
    )
    assert {"plain,release", "plain,remove", "plain,retry"} <= set(done.stdout.split())


def test_the_version_names_the_libraries(tmp_path: Path) -> None:
    shown = run(tmp_path, "--version").stdout
    assert shown.startswith("relay ")
    for name in ("aiosmtpd", "aiosmtplib", "dnspython", ssl.OPENSSL_VERSION.split()[0], "SQLite"):
        assert name in shown
