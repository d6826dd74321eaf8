"""`relay policy import postfix`: what it prints, and with which exit status."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from relay.cli import relay
from relay.cli.manual import man_page

TABLE = Path(__file__).parents[1] / "fixtures" / "smtp_tls_policy"
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`relay policy import postfix` for a table, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("RELAY_")]:
        monkeypatch.delenv(variable)

    def call(text: str, *options: str) -> Result:
        (tmp_path / "table").write_text(text)
        command = ["policy", "import", "postfix", "table", *options]
        return CliRunner().invoke(relay, command, prog_name="relay")

    return call


def checked(result: Result, tmp_path: Path) -> object:
    """The YAML, which passes `relay check`."""
    (tmp_path / "policy.yaml").write_text(result.stdout)
    command = ["check", "--file-only", "-q", "-c", str(tmp_path / "policy.yaml")]
    check = CliRunner().invoke(relay, command, prog_name="relay")
    assert check.exit_code == 0, check.stderr
    assert ": policy." not in check.stderr
    return yaml.safe_load(result.stdout)["policy"]


def test_a_table_becomes_rules_that_pass_the_check(run: Run, tmp_path: Path) -> None:
    result = run("partner.example encrypt\n.partner.example may\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert checked(result, tmp_path) == {
        "destinations": {
            "partner.example": {
                "require_tls": True,
                "skip_verification": True,
                "allow_override": False,
            },
            "*.partner.example": {"require_tls": False, "skip_verification": True},
        }
    }


def test_a_line_without_equivalent_is_named_on_stderr_and_in_the_yaml(run: Run) -> None:
    result = run("# old\n\npartner.example fingerprint match=aa:bb\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("table:3: partner.example: no equivalent: a rule for ")
    assert "    # line 3: partner.example fingerprint match=aa:bb\n" in result.stdout
    assert "    #   no equivalent: a rule for " in result.stdout


def test_a_stricter_rule_is_named_and_is_no_failure(run: Run, tmp_path: Path) -> None:
    result = run("partner.example secure\n")
    assert result.exit_code == 0
    assert result.stderr.startswith("table:1: partner.example: stricter: ")
    [rule] = checked(result, tmp_path)["destinations"].values()  # type: ignore[index]
    assert rule["mx"] == ["partner.example", "*.partner.example"]


def test_the_old_table_becomes_a_file_that_passes_the_check(run: Run, tmp_path: Path) -> None:
    result = run(TABLE.read_text("utf-8"), "--level", "may")
    assert result.exit_code == 1
    policy = checked(result, tmp_path)
    assert len(policy["destinations"]) == 34  # type: ignore[index]
    assert policy["default"] == {"require_tls": False, "skip_verification": True}  # type: ignore[index]
    told = [line for line in result.stdout.splitlines() if "    # line " in line]
    assert len(told) == 40
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_next_hops_are_found_in_the_routes_of_the_configuration(run: Run, tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text(
        'routes: {a.example: {host: gw.example, port: 587}, "*": {host: "[192.0.2.1]"}}\n'
    )
    text = "[gw.example]:587 verify\n[192.0.2.1] dane\n"
    result = run(text, "-c", "relay.yaml", "--level", "none")
    assert result.exit_code == 0
    policy = checked(result, tmp_path)
    assert policy["default"]["skip_verification"] is True  # type: ignore[index]
    assert policy["dane"] == "enforce"  # type: ignore[index]
    assert list(policy["destinations"]) == ["a.example"]  # type: ignore[index]


def test_a_configuration_that_is_named_and_broken_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text("routs: {}\n")
    result = run("a.example may\n", "-c", "relay.yaml")
    assert result.exit_code == 1
    assert "relay.yaml:1: routs" in result.stderr
    assert result.stdout == ""


def test_a_table_of_nothing_is_a_policy_of_nothing(run: Run, tmp_path: Path) -> None:
    assert checked(run("# nothing\n"), tmp_path) == {"destinations": {}}


def test_text_of_a_table_moves_no_cursor(run: Run, tmp_path: Path) -> None:
    result = run("a.example \x1b[2Jencrypt\nb.example may x=\x07\n\u202e.example may\n")
    assert result.exit_code == 1
    assert all(c.isprintable() or c == "\n" for c in result.stdout + result.stderr)
    checked(result, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["hostname: relay.example.net\nroutes:\n", f"-----BEGIN PRIVATE KEY-----\n{'MIIE' * 16}\n"],
)
def test_a_file_without_any_rule_is_refused_and_not_shown(run: Run, text: str) -> None:
    result = run(text, "--level", "may")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "table: no line is a rule, such as `partner.example encrypt`\n"


def test_a_database_is_refused(run: Run) -> None:
    result = run("\0\0\0a.example\0may\0\na.example may\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("table: it is not text")


def test_a_line_that_is_no_rule_is_shown_by_its_beginning_only(run: Run) -> None:
    result = run(f"a.example may\n{'MIIE' * 16}\n{'b_,' * 16} may\n")
    assert result.exit_code == 0
    for output in (result.stdout, result.stderr):
        assert f"{'MIIE' * 5}…" in output
        assert "MIIE" * 6 not in output
        assert "b_," * 7 not in output


def test_a_table_is_named_as_main_cf_names_it(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_text("a.example may\n")
    command = ["policy", "import", "postfix", f"hash:{table}"]
    result = CliRunner().invoke(relay, command)
    assert result.exit_code == 0, result.stderr
    assert "a.example" in result.stdout
    nothing = CliRunner().invoke(relay, [*command[:-1], ""])
    assert nothing.exit_code == 2
    assert "is empty" in nothing.stderr


def test_names_of_match_with_a_comma_between_are_told_the_colon(run: Run) -> None:
    result = run("a.example secure match=nexthop,dot-nexthop\n")
    assert "a colon: match=nexthop:dot-nexthop)" in result.stderr


def test_a_file_that_is_not_there_is_a_wrong_usage(run: Run) -> None:
    result = CliRunner().invoke(relay, ["policy", "import", "postfix", "gone"])
    assert result.exit_code == 2


def test_tables_of_senders_become_routes_that_pass_the_check(run: Run, tmp_path: Path) -> None:
    (tmp_path / "relayhosts").write_text(
        "@example.com [smtp.example.net]:587\nbot@example.com [ses.example]:465\n@x.example DUNNO\n"
    )
    (tmp_path / "transports").write_text("@example.com relay:[hub.example.net]\n")
    options = ("--sender-relayhosts", "relayhosts", "--sender-transports", "texthash:transports")
    result = run("partner.example encrypt\n", *options)
    assert result.exit_code == 1
    assert "relayhosts:3: @x.example: no equivalent: no route of this sender's" in result.stderr
    assert "partner.example" in str(checked(result, tmp_path))
    found = yaml.safe_load(result.stdout)
    assert found["routes_by_sender"] == {
        "example.com": {"next_hop": "hub.example.net"},
        "bot@example.com": {"next_hop": "ses.example-465"},
    }
    assert found["next_hops"] == {
        "hub.example.net": {"hosts": ["hub.example.net"], "port": 25},
        "ses.example-465": {"hosts": ["ses.example"], "port": 465, "tls": "implicit"},
    }


def test_tables_of_senders_need_no_table_of_policies(tmp_path: Path) -> None:
    (tmp_path / "senders").write_text("@example.com [smtp.example.net]\n")
    command = ["policy", "import", "postfix", "--sender-relayhosts", str(tmp_path / "senders")]
    result = CliRunner().invoke(relay, command, prog_name="relay")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "policy" not in yaml.safe_load(result.stdout)
    assert CliRunner().invoke(relay, command[:3], prog_name="relay").exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[smtp.p.example]:587 relay@p.example:s3cret\n", "a table of logins"),
        ("relayhost = [s3cret.example]\n", "main.cf, and no table of TLS"),
        ("s3cret.example smtp:[gw.example]\n", "write its lines under routes"),
        ("@s3cret.example [gw.example]\n", "--sender-relayhosts reads it"),
        ("@s3cret.example smtp:[gw.example]\n", "--sender-transports reads it"),
    ],
)
def test_another_file_of_postfix_is_refused_by_its_name_and_not_shown(
    run: Run, text: str, said: str
) -> None:
    result = run(text, "--level", "may")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("table: ")
    assert said in result.stderr
    assert "s3cret" not in result.stderr


@pytest.mark.parametrize("option", ["--sender-relayhosts", "--sender-transports"])
def test_table_of_logins_is_refused_also_as_a_table_of_senders(run: Run, option: str) -> None:
    result = run("a@p.example a@p.example:s3cret\n", option, "table")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "s3cret" not in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "b.example b@p.example:s3cret",
        "b.example encrypt b:s3cret",
        "[b.example]:587 b:s3cret",
        "b.example:587 b:s3cret",
        "/b/ b:s3cret",
        "a.example b:s3cret",
        "b b:s3cret",
        "b@p b:s3cret",
        "b:s3cret",
        "b:s3cret x",
        ".b:s3cret x",
    ],
)
def test_line_that_may_be_a_login_is_shown_without_it(run: Run, line: str) -> None:
    result = run(f"a.example may\nc.example may\n{line}\n")
    assert "line 3" in result.stdout
    assert "s3cret" not in result.stdout + result.stderr


def test_import_names_what_a_next_hop_has_for_a_fingerprint_and_its_neighbours(run: Run) -> None:
    lines = "a.example fingerprint match=aa:bb", "b.example secure tafile=/x servername=y.example"
    told = run("\n".join(lines)).stderr
    for key in ("ca_file: none and pin_sha256", "next hop with ca_file,", "with verify_name"):
        assert key in told


def test_the_manual_page_has_the_command() -> None:
    assert r".SS relay policy import postfix" in man_page()
