"""The site's reference pages, made of what the program itself says. Markdown; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from relay.api.openapi import document
from relay.cli import relay
from relay.cli.manual import each_command
from relay.config.schema import json_schema
from relay.mail.event import Event, of_node
from relay.mail.outcome import (
    Bounced,
    CertificateFacts,
    Deferred,
    Delivered,
    Downgrade,
    DowngradeReason,
    HopPolicy,
    HopSession,
    Level,
    PolicyMode,
    PolicyType,
    VerifiedBy,
)
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.retry import RetrySchedule
from relay.queue.settle import settle
from relay.report.deliverylog import accepted, operated, removed, settled
from relay.report.metrics import Metrics, Snapshot

__all__ = ["commands", "configuration", "delivery_log", "http", "metrics"]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


# --- configuration --------------------------------------------------------------------------------


def configuration(reference: str) -> str:
    """Each section: its keys with form and default, and its part of the commented reference."""
    schema = json_schema()
    parts = _parts(reference)
    lines = [
        "# Configuration",
        "",
        "Every key, from the schema that `relay check` goes by. All keys are optional unless the "
        "table says otherwise. The text of each section is that of `conf/relay.yaml`.",
        "",
    ]
    for name, shape in schema["properties"].items():
        if name.endswith("_file"):
            continue
        lines += [f"## {name}", ""]
        lines += _table(("key", "takes", "default"), _keys(name, shape))
        if name in parts:
            lines += ["```yaml", parts[name], "```", ""]
    return "\n".join(lines)


def _parts(reference: str) -> dict[str, str]:
    """The commented reference, section by section, each with the comment above it."""
    blocks = re.split(r"\n\n(?=#[^\n]|\w)", reference)
    found = {}
    for block in blocks:
        key = re.search(r"^#?(\w+):", block, re.MULTILINE)
        if key is not None:
            found[key[1]] = block.strip("\n")
    return found


def _keys(path: str, shape: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each key below `path`, with what it takes and its default."""
    shape, kind = _unwrapped(shape)
    if "properties" in shape:
        for name, inner in shape["properties"].items():
            note = " (needed)" if name in shape.get("required", ()) else ""
            yield from (
                (key, takes + note if key == f"`{path}.{name}`" else takes, default)
                for key, takes, default in _keys(f"{path}.{name}", inner)
            )
    elif isinstance(shape.get("additionalProperties"), dict):
        yield from _keys(f"{path}.NAME", shape["additionalProperties"])
    elif "properties" in _unwrapped(shape.get("items", {}))[0]:
        yield from _keys(f"{path}[]", shape["items"])
    else:
        yield f"`{path}`", f"{_takes(shape)}{kind}", _default(shape)


def _unwrapped(shape: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The shape of a key that may also be null (or never)."""
    if "anyOf" not in shape:
        return shape, ""
    inner, *others = shape["anyOf"]
    words = ", or never" if {"const": "never"} in others else ""
    return {**inner, **{key: shape[key] for key in shape if key != "anyOf"}}, words


def _takes(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        words = [str(one).lower() if isinstance(one, bool) else str(one) for one in shape["enum"]]
        return "true or false" if words[:2] == ["true", "false"] else _code(words)
    example = f", such as {_code(shape['examples'])}" if shape.get("examples") else ""
    match shape.get("type"):
        case "integer":
            return f"a number, {shape['minimum']} to {shape['maximum']}"
        case ["array", "null"] | "array":
            return f"a list: {_takes(_unwrapped(shape['items'])[0])}"
        case ["string", "integer"]:
            return f"a size{example}"
        case _:
            return f"a text{example}"


def _code(words: Iterable[Any]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _default(shape: Mapping[str, Any]) -> str:
    return f"`{json.dumps(shape['default'])}`" if "default" in shape else ""


# --- commands -------------------------------------------------------------------------------------


def commands() -> str:
    """Every command, with its help as the terminal shows it."""
    top = click.Context(relay, info_name="relay", max_content_width=80, terminal_width=80)
    lines = ["# Commands", "", "What `relay --help` and each command's `--help` say.", ""]
    for context in (top, *each_command(top)):
        lines += [f"## {context.command_path}", "", "```text"]
        lines += [context.command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


# --- HTTP -----------------------------------------------------------------------------------------


def http() -> str:
    """Every path, method, parameter and answer."""
    described = document()
    lines = [
        "# HTTP interface",
        "",
        "A running relay serves this description as OpenAPI at `/relay/v1/openapi.json`. "
        "[moving-from-mailgun.md](../moving-from-mailgun.md) says how it is used.",
        "",
    ]
    for path, methods in described["paths"].items():
        for method, does in methods.items():
            lines += [f"## {method.upper()} {path}", "", f"{does['summary']}.", ""]
            rows = [*_parameters(does), *_body(does, described)]
            if rows:
                lines += _table(("parameter", "where", "takes"), rows)
            lines += _table(("answer", "meaning", "content"), _answers(does))
    lines += ["## Types", ""]
    for name, shape in described["components"]["schemas"].items():
        lines += [f"### {name}", "", "```json", json.dumps(shape, indent=2), "```", ""]
    return "\n".join(lines)


def _parameters(does: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for one in does.get("parameters", ()):
        where = one["in"] + (", needed" if one.get("required") else "")
        yield f"`{one['name']}`", where, _words(one["schema"])


def _body(does: Mapping[str, Any], described: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for kind, content in does.get("requestBody", {}).get("content", {}).items():
        shape = content["schema"]
        if "$ref" in shape:
            shape = described["components"]["schemas"][shape["$ref"].rpartition("/")[2]]
        for name, inner in shape.get("properties", {}).items():
            needed = ", needed" if name in shape.get("required", ()) else ""
            yield f"`{name}`", f"{kind}{needed}", _words(inner)


def _answers(does: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for code, answer in sorted(does["responses"].items()):
        content = [
            f"{kind}: {_words(one['schema'])}" for kind, one in answer.get("content", {}).items()
        ]
        yield str(code), answer["description"], ", ".join(content)


def _words(shape: Mapping[str, Any]) -> str:
    if "$ref" in shape:
        name = shape["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in shape:
        return _code(shape["enum"])
    if shape.get("type") == "array":
        return f"list of {_words(shape['items'])}"
    if "anyOf" in shape:
        return " or ".join(_words(one) for one in shape["anyOf"])
    return "file" if shape.get("format") == "binary" else str(shape.get("type", "anything"))


# --- metrics --------------------------------------------------------------------------------------


def metrics() -> str:
    """What /metrics tells, with the labels that are there from the start."""
    told = Metrics().render(Snapshot()).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", told, re.MULTILINE))
    helps = re.findall(r"^# HELP (\S+) (.*)$", told, re.MULTILINE)
    rows = [
        (f"`{name}`", kinds[name], text)
        for name, text in helps
        if not name.startswith("process_") and not name.endswith("_created")
    ]
    lines = [
        "# Metrics",
        "",
        "`/metrics` on `admin.http`, for Prometheus; the password is one of `admin.api_keys`. "
        "[alerts.yml](../alerts.yml) has rules to begin with, "
        "[grafana-dashboard.json](../grafana-dashboard.json) a dashboard.",
        "",
        *_table(("metric", "type", "meaning"), rows),
        "Beside them the usual ones of a process, `process_…`.",
        "",
    ]
    return "\n".join(lines)


# --- delivery log ---------------------------------------------------------------------------------


def delivery_log(explained: str) -> str:
    """Every field that an event can have, with its meaning, and an example of each event."""
    meanings = _meanings(explained)
    lines = [
        "# Delivery log",
        "",
        "Each event as the log writes it (one line there), and every field with its meaning. "
        "[Reading the delivery log](../reading-the-delivery-log.md) has the questions that these "
        "lines answer.",
        "",
    ]
    seen: dict[str, list[str]] = {}
    for title, event in _examples():
        fields = json.loads(event.line)
        lines += [f"## {title}", "", "```json", json.dumps(fields, indent=2), "```", ""]
        for name in _names(fields):
            seen.setdefault(name, []).append(title)
    unexplained = [name for name in seen if _meaning(name, meanings) is None]
    if unexplained:
        raise SystemExit(
            f"docs/reading-the-delivery-log.md explains no {', '.join(unexplained)}; add a row"
        )
    rows = ((f"`{name}`", str(_meaning(name, meanings))) for name in sorted(seen))
    lines += ["## Every field", "", *_table(("field", "meaning"), rows)]
    return "\n".join(lines)


def _meanings(explained: str) -> dict[str, str]:
    """What the tables of the page say of each field; names stand in its first column. Links lead
    from a page below to the pages beside it.
    """
    found = {}
    for names, meaning in re.findall(r"^\| (`.*?) \| (.*) \|$", explained, re.MULTILINE):
        for name in re.findall(r"`([\w.-]+)`", names):
            found[name] = re.sub(r"\]\((?=[\w-]+\.md)", "](../", meaning)
    return found


def _meaning(name: str, meanings: Mapping[str, str]) -> str | None:
    """Its own meaning, or that of the object it is in."""
    name = name.removeprefix("delivery-status.")
    while name not in meanings and "." in name:
        name = name.rpartition(".")[0]
    return meanings.get(name)


def _names(fields: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict) and name not in ("filter", "user-variables"):
            yield from _names(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


_NOON = datetime(2026, 10, 1, 12, tzinfo=UTC)
_SETTINGS = TlsSettings(
    Setting(True, Source.DESTINATION, "partner.example"), Setting(False, Source.DEFAULT)
)
_LAX = TlsSettings(Setting(False, Source.DEFAULT), Setting(False, Source.DEFAULT))
_SUMMARY = MessageSummary("1@example.com", "Ann <ann@example.com>", "bob@partner.example", "Hello")
_MESSAGE = QueuedMessage("1K0P53EYNTNV2HMRV", "ann@example.com", _NOON, 586, _SUMMARY)
_POLICY = HopPolicy(PolicyType.STS, PolicyMode.ENFORCE, None)
_CERTIFICATE = CertificateFacts(
    "CN=mx1.partner.example",
    "CN=An Authority",
    ("mx1.partner.example",),
    _NOON - timedelta(days=20),
    _NOON + timedelta(days=70),
    "5f" * 32,
)


def _session(**facts: Any) -> HopSession:
    return HopSession("mx1.partner.example", "192.0.2.7", seconds=0.437, **facts)


def _examples() -> Iterator[tuple[str, Event]]:
    strict = QueuedRecipient(0, "bob@partner.example", "partner.example", _SETTINGS)
    lax = QueuedRecipient(0, "bob@other.example", "other.example", _LAX)
    in_tls = _session(
        tls=True,
        tls_version="TLSv1.3",
        tls_cipher="TLS_AES_256_GCM_SHA384",
        verified_by=VerifiedBy.PKIX,
        certificate=_CERTIFICATE,
        policy=_POLICY,
        unsigned="",
    )
    reason = DowngradeReason.NOT_OFFERED
    in_clear = _session(
        tls=False,
        downgrade=Downgrade(Level.VERIFIED, reason, "STARTTLS not offered"),
        unsigned="the key of example.com cannot be read",
    )
    unmet = Deferred(
        "4.7.4", 0, "", "mx1.partner.example [192.0.2.7]: STARTTLS not offered", _session(tls=False)
    )
    unknown = Bounced("5.1.1", 550, "5.1.1 no such user", "", in_tls)
    yield "accepted", accepted(_MESSAGE, [strict])
    yield "delivered", _after(Delivered("2.0.0", 250, "2.0.0 OK", session=in_tls), strict)
    yield "delivered in clear", _after(Delivered("2.0.0", 250, "2.0.0 OK", session=in_clear), lax)
    yield "failed for now", _after(unmet, strict)
    yield "failed for good", _after(unknown, strict)
    yield "failed at the end of the lifetime", _after(unmet, strict, timedelta(days=5))
    yield "removed", removed(_MESSAGE, strict, now=_NOON + timedelta(hours=1))
    wanted = {"domain": "partner.example"}
    yield "operator", operated("alice", "retry", wanted, count=12, now=_NOON)
    yield "accepted by one of several nodes", of_node(accepted(_MESSAGE, [strict]), "mx-a")


def _after(
    outcome: Delivered | Deferred | Bounced,
    recipient: QueuedRecipient,
    waited: timedelta = timedelta(seconds=1),
) -> Event:
    entry, now = Entry(_MESSAGE, (recipient,)), _NOON + waited
    settlement = settle(entry, {0: outcome}, schedule=RetrySchedule(), now=now)
    return settled(entry, settlement.changes[0], now=now)
