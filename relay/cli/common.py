"""What the commands share: finding the configuration, asking the relay, and showing text safely."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from relay.mail.jsontext import JsonDocument, JsonFields
from relay.mail.printable import printable
from relay.report import words

if TYPE_CHECKING:
    from relay.config import Config
    from relay.deliver.memory import DowngradeMemory

_CONFIG = "relay.config"

_WITHOUT_RELAY = ("list", "nodes", "show", "log", "report", "memory-list", "memory-suggest")
"""What can be asked of the stores of a relay that does not run."""

F = TypeVar("F", bound=Callable[..., object])


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not before."""

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, name = self._lazy[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


def config_option(command: F) -> F:
    """`-c FILE`, on a command or its group; the one of the command itself comes first."""

    def remember(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
        if value is not None:
            ctx.meta[_CONFIG] = value

    return click.option(
        "-c",
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        expose_value=False,
        callback=remember,
        help="The configuration (default: $RELAY_CONFIG, /etc/relay/relay.yaml, conf/relay.yaml).",
    )(command)


def config_file(ctx: click.Context) -> Path:
    """The configuration file to read. Fails if it exists and this user may not read it."""
    from relay.admin.client import who_may_open
    from relay.config import default_path

    named = ctx.meta.get(_CONFIG)
    path = named if isinstance(named, Path) else default_path(os.environ)
    try:
        path.open("rb").close()
    except PermissionError:
        fail(f"{path}: permission denied; run this as {who_may_open(path)}")
    except OSError:
        pass  # reading it says what is wrong
    return path


def config_is_named(ctx: click.Context) -> bool:
    """Whether somebody said which file it is; else there need not be one."""
    return _CONFIG in ctx.meta or bool(os.environ.get("RELAY_CONFIG"))


def load_config(path: Path, *, only_to_ask: bool = False) -> Config:
    """The configuration. On mistakes: all of them to stderr, and exit 1.

    `only_to_ask`: for a command that only asks the relay; its user may be unable to read files that
    the relay can read.
    """
    from relay.config import ConfigError, consider, load

    try:
        return load(path, os.environ, look=None if only_to_ask else consider)
    except ConfigError as error:
        fail(str(error))


def fail(text: str) -> NoReturn:
    """Write the text to stderr and exit 1."""
    click.echo(printable(text, keep="\n"), err=True)
    sys.exit(1)


def asked(
    ctx: click.Context, request: JsonFields, *, patient: bool = False
) -> Iterator[JsonDocument]:
    """`answers`, with the configuration that the command line names."""
    config = load_config(config_file(ctx), only_to_ask=True)
    return answers(config, request, patient=patient)


def items_of(lines: Iterable[JsonDocument]) -> Iterator[JsonDocument]:
    """What an answer lists, whether one to a line or many."""
    return (item for line in lines for item in line.get("items", ()))


def answers(
    config: Config, request: JsonFields, *, patient: bool = False
) -> Iterator[JsonDocument]:
    """The answer of the running relay; where none runs, of its store opened for reading.

    `patient`: without a time limit (for following a log).
    """
    from relay.admin.client import NotRunning, RelayError, ask

    try:
        yield from ask(Path(config.admin.socket), request, seconds=None if patient else 60.0)
    except NotRunning as error:
        if request["verb"] not in _WITHOUT_RELAY or request.get("follow"):
            fail(f"{error}; start one with `relay serve`")
        yield from _without_relay(config, request)
    except RelayError as error:
        fail(str(error))


def _without_relay(config: Config, request: JsonFields) -> Iterator[JsonDocument]:
    """Answer from the stores of all workers, which no relay writes to now."""
    from relay.admin.client import who_may_open
    from relay.admin.control import Control
    from relay.admin.operator import Operator
    from relay.admin.requests import RequestError
    from relay.queue.engine import open_to_read
    from relay.queue.store import SpoolError
    from relay.workers.all_queues import AllQueues

    location = config.queue.location

    async def answer() -> AsyncIterator[JsonDocument]:
        async with contextlib.AsyncExitStack() as stack:
            queues = await open_to_read(location, stack)
            operator = Operator(AllQueues(queues), lambda: datetime.now(UTC))
            asks_memory = request["verb"].startswith("memory-")
            memory = _memory(config, operator.clock, stack) if asks_memory else None
            async for line in Control(operator, memory=memory).answer(request):
                yield line

    try:
        yield from _drive(answer())
    except (SpoolError, OSError) as error:
        text = f"no relay answers at {config.admin.socket}, and its queue cannot be read: {error}"
        is_denied = isinstance(error.__cause__ or error, PermissionError)
        fail(f"{text}; run this as {who_may_open(Path(location.path))}" if is_denied else text)
    except RequestError as error:
        fail(str(error))


def _memory(
    config: Config, clock: Callable[[], datetime], stack: contextlib.AsyncExitStack
) -> DowngradeMemory:
    """What hosts have shown of TLS, opened for reading."""
    from relay.deliver.memory import DowngradeMemory
    from relay.queue.engine import open_memory_beside

    store = open_memory_beside(config.queue.location)
    stack.push_async_callback(store.close)
    return DowngradeMemory(store, lambda: config.downgrade_memory, clock=clock)


def _drive(lines: AsyncIterator[JsonDocument]) -> Iterator[JsonDocument]:
    """An asynchronous iterator, walked from outside an event loop."""
    import asyncio

    with asyncio.Runner() as runner, contextlib.suppress(StopAsyncIteration):
        while True:
            yield runner.run(_next(lines))


async def _next(lines: AsyncIterator[JsonDocument]) -> JsonDocument:
    return await anext(lines)


def age(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    """An option's value such as 30m, 4h, 2d."""
    from relay.config.quantities import parse_duration

    try:
        return parse_duration(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


Filter = TypeVar("Filter", str, "tuple[str, ...]", None)


def not_empty(ctx: click.Context, param: click.Parameter, value: Filter) -> Filter:
    """Refuse an option with an empty value: `--sender "$UNSET"` would match every sender."""
    if value is not None and not all(
        one.strip() for one in ([value] if isinstance(value, str) else value)
    ):
        raise click.BadParameter("is empty: give it a value or leave it out", ctx, param)
    return value


def domain_name(ctx: click.Context, param: click.Parameter, value: Filter) -> Filter:
    """Refuse an empty value, and one that is no domain name, each as it was written."""
    from relay.mail.address import AddressError, normalise_domain

    not_empty(ctx, param, value)
    names: tuple[str, ...] = (value,) if isinstance(value, str) else value or ()
    for name in names:
        try:
            normalise_domain(name)
        except AddressError as error:
            raise click.BadParameter(f"{printable(name)}: {error}", ctx, param) from None
    return value


def answer_text(code: int, status: str, message: str) -> str:
    """A host's answer in one line, safe to show in a terminal."""
    return printable(words.answer_text(code, status, message))


def age_text(age: timedelta) -> str:
    """A duration in the unit that a person would use."""
    seconds = max(int(age.total_seconds()), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or (unit != "m" and seconds >= length and seconds % length == 0):
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def size_text(octets: int) -> str:
    """A size in the unit that a person would use."""
    for unit, count in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if octets >= 2 * count:
            return f"{octets // count} {unit}"
    return f"{octets} B"


def below(text: str, width: int) -> str:
    """Text below the line it belongs to, indented. `width`: of the terminal, 0 for none."""
    if not width:
        return f"    {text}"
    return textwrap.fill(text, width, initial_indent="    ", subsequent_indent="      ")
