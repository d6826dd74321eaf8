"""The manual pages: relay(1), made from `--help`, and relay.yaml(5), made from conf/relay.yaml.

`make man` writes both to build/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from relay import __version__
from relay.cli import relay


def man_page() -> str:
    """The whole page in man(7)'s language."""
    top = click.Context(relay, info_name="relay")
    lines = [
        f'.TH RELAY 1 "" "relay {__version__}" "User Commands"',
        ".SH NAME",
        r"relay \- an SMTP smarthost that controls TLS to the next hop",
        ".SH SYNOPSIS",
        r".B relay",
        r"[\-c FILE] COMMAND [OPTION]... [ARGUMENT]...",
        ".SH DESCRIPTION",
        *_text(relay.help or ""),
        ".SH OPTIONS",
        *_options(top),
        ".SH COMMANDS",
    ]
    for context in each_command(top):
        if isinstance(context.command, click.Group):
            continue
        lines += [f".SS {_escaped(_name(context))}", *_command(context)]
    lines += [".SH SEE ALSO", ".BR relay.yaml (5)"]
    return "\n".join(lines) + "\n"


def man_page_of_file(reference: str) -> str:
    """relay.yaml(5), from the text of the commented reference."""
    lines = [
        f'.TH RELAY.YAML 5 "" "relay {__version__}" "File Formats"',
        ".SH NAME",
        r"relay.yaml \- configuration of the SMTP smarthost relay",
        ".SH SYNOPSIS",
        ".I /etc/relay/relay.yaml",
        ".SH DESCRIPTION",
        *_text(_ABOUT_FILE),
        ".SH KEYS",
        *_text("Every key, with its default. What is commented out is an example."),
        ".PP",
        ".nf",
        *map(_escaped, reference.rstrip("\n").split("\n")),
        ".fi",
        ".SH SEE ALSO",
        ".BR relay (1)",
    ]
    return "\n".join(lines) + "\n"


_ABOUT_FILE = """
The service and every command read one file in YAML. Each key may be left out; a key that is
unknown, of the wrong type or there twice is a mistake.

Durations are written as 30s, 5m, 4h, 5d or 1h30m, sizes as 64KiB or 50MiB.

\b
After a change:
  relay check
  systemctl reload relay

Any key can be set in the environment, which wins over the file: RELAY__QUEUE__PATH is queue.path.
Its value is read as YAML.
"""


def each_command(parent: click.Context) -> Iterator[click.Context]:
    """Every command and group below a group, by name; a group before its own commands."""
    group = parent.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None or command.hidden:
            continue
        context = click.Context(command, info_name=name, parent=parent)
        yield context
        if isinstance(command, click.Group):
            yield from each_command(context)


def _name(context: click.Context) -> str:
    return context.command_path


def _command(context: click.Context) -> Iterator[str]:
    usage = " ".join(context.command.collect_usage_pieces(context))
    yield f".B {_escaped(_name(context))}"
    yield _escaped(usage)
    yield ".PP"
    yield from _text(context.command.help or "")
    yield from _options(context)


def _options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield ".TP"
            yield f".B {_escaped(record[0])}"
            yield _escaped(" ".join(record[1].split()))


def _text(text: str) -> Iterator[str]:
    """Paragraphs; lines after \\b keep their line breaks, as in click."""
    for paragraph in re.split(r"\n\s*\n", _unindented(text)):
        if paragraph.startswith("\b"):
            yield from (".PP", ".nf", *map(_escaped, paragraph.split("\n")[1:]), ".fi")
        else:
            yield from (".PP", *map(_escaped, paragraph.strip().split("\n")))


def _unindented(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)


def _escaped(line: str) -> str:
    """A line without a special meaning for man(7)."""
    line = line.replace("\\", r"\e").replace("-", r"\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["relay"]:
            sys.stdout.write(man_page())
        case ["relay.yaml", reference]:
            sys.stdout.write(man_page_of_file(Path(reference).read_text(encoding="utf-8")))
        case _:
            sys.exit("usage: python -m relay.cli.manual relay | relay.yaml conf/relay.yaml")
