"""relay(1): the manual page, made of what `--help` says. `make man` writes it to build/relay.1."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import click

from relay import __version__
from relay.cli import relay

__all__ = ["man_page"]


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
    for context in _commands(top):
        lines += [f".SS {_escaped(_name(context))}", *_command(context)]
    lines += [
        ".SH SEE ALSO",
        "The commented reference of the configuration, conf/relay.yaml, and the pages under docs/.",
    ]
    return "\n".join(lines) + "\n"


def _commands(parent: click.Context) -> Iterator[click.Context]:
    """Every command that does something, those of groups too, by name."""
    group = parent.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None or command.hidden:
            continue
        context = click.Context(command, info_name=name, parent=parent)
        if isinstance(command, click.Group):
            yield from _commands(context)
        else:
            yield context


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
    """Paragraphs; those after \\b are kept as they are, as click keeps them."""
    for paragraph in re.split(r"\n\s*\n", _unindented(text)):
        if paragraph.startswith("\b"):
            yield from (".PP", ".nf", *map(_escaped, paragraph.split("\n")[1:]), ".fi")
        else:
            yield from (".PP", *map(_escaped, paragraph.strip().split("\n")))


def _unindented(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)


def _escaped(line: str) -> str:
    """A line that means itself."""
    line = line.replace("\\", r"\e").replace("-", r"\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


if __name__ == "__main__":
    sys.stdout.write(man_page())
