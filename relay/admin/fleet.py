"""Several workers answered for as one: the control socket's requests put to all, the answers
merged.

    list              by queue id, which sorts by arrival
    show              whoever has the message
    log               by time; followed, as they come
    retry, hold, …    done by all; the changes added up, unknown is what is unknown to all
    report            the counts added up, the exceptions by time
    health            what is wrong with any, by its number
    status            deliveries under way added up, silent destinations of any
    everything else   the first worker's alone

A worker that does not answer (it may just be starting again) makes the request end in an error,
after what the others had to say: half an answer never looks like a whole one.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from relay.admin.control import REQUEST_BYTES, Answer, Answers, RequestError
from relay.admin.operations import PAGE
from relay.admin.report import count_of_json, counts_as_json
from relay.mail.jsontext import of_json
from relay.queue.statistics import added_up
from relay.queue.verbs import VERBS

__all__ = ["Fleet", "Peer"]

_LINE_BYTES = 64 * REQUEST_BYTES
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
_WAITING_LINES = 1000

Line = dict[str, Any]


class Peer:
    """Another worker, reached through its control socket."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self._path = path

    async def answer(self, request: Mapping[str, Any]) -> Answer:
        """The lines that answer a request."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_BYTES)
        except (OSError, TimeoutError):
            raise RequestError(f"worker {self.number} does not answer; try again") from None
        patience = None if request.get("follow") else _ANSWER_SECONDS
        try:
            writer.write(json.dumps(request).encode("ascii") + b"\n")
            line: Line = {}
            while "done" not in line:
                async with asyncio.timeout(patience):
                    line = of_json(await reader.readline() or b'{"error": "its answer broke off"}')
                if "error" in line:
                    raise RequestError(f"worker {self.number}: {line['error']}")
                yield line
        except (OSError, TimeoutError, ValueError) as error:
            raise RequestError(f"worker {self.number}: its answer broke off: {error}") from None
        finally:
            writer.close()


class Fleet:
    """All workers. The first of `workers` is the one that is asked what only one has to answer."""

    def __init__(self, workers: Sequence[Answers]) -> None:
        self._workers = workers

    async def answer(self, request: Mapping[str, Any]) -> Answer:
        """The lines that answer a request, as if there were one relay."""
        verb = request.get("verb")
        match verb:
            case "list":
                lines = self._list(request)
            case "show":
                lines = self._show(request)
            case "log":
                lines = self._log(request)
            case "report":
                lines = self._report(request)
            case "health":
                lines = self._health(request)
            case "status":
                lines = self._status(request)
            case str() if verb in VERBS:
                lines = self._change(request)
            case _:
                lines = self._workers[0].answer(request)
        async for line in lines:
            yield line

    def _ask(self, request: Mapping[str, Any]) -> list[Answer]:
        return [worker.answer(request) for worker in self._workers]

    async def _list(self, request: Mapping[str, Any]) -> Answer:
        count = 0
        page: list[Line] = []
        async for line in _merged(
            [_one_by_one(answer) for answer in self._ask(request)], _queue_id_of
        ):
            if "done" not in line:
                count += 1
                page.append(line)
            if len(page) == PAGE or ("done" in line and page):
                yield {"items": page}
                page = []
        yield {"done": {"count": count}}

    async def _report(self, request: Mapping[str, Any]) -> Answer:
        answers = self._ask(request)
        heads = [(await anext(answer))["report"] for answer in answers]
        parts = [[count_of_json(one) for one in head["counts"]] for head in heads]
        yield {"report": {**heads[0], "counts": counts_as_json(added_up(parts))}}
        page: list[Line] = []
        async for line in _merged([_one_by_one(answer) for answer in answers], _exception_key):
            if "done" not in line:
                page.append(line)
            if len(page) == PAGE or ("done" in line and page):
                yield {"items": page}
                page = []
        yield {"done": {}}

    async def _show(self, request: Mapping[str, Any]) -> Answer:
        trouble: RequestError | None = None
        for answer in self._ask(request):
            try:
                lines = [line async for line in answer]
            except RequestError as error:
                trouble = error
                continue
            if "item" in lines[0]:
                for line in lines:
                    yield line
                return
        if trouble is not None:
            raise trouble
        yield {"done": {"unknown": [request.get("id")]}}

    async def _change(self, request: Mapping[str, Any]) -> Answer:
        done = [line["done"] for line in await _together(self._ask(request))]
        unknown = set.intersection(*(set(one["unknown"]) for one in done))
        yield {"done": {"changed": sum(one["changed"] for one in done), "unknown": sorted(unknown)}}

    async def _health(self, request: Mapping[str, Any]) -> Answer:
        found: dict[str, list[str]] = {"liveness": [], "readiness": []}
        for number, answer in enumerate(self._ask(request)):
            try:
                [line] = [line async for line in answer]
            except RequestError as error:
                line = {"done": {key: [str(error)] for key in found}}
            for key, words in found.items():
                words += [f"worker {number}: {word}" for word in line["done"][key]]
        yield {"done": found}

    async def _status(self, request: Mapping[str, Any]) -> Answer:
        done = [line["done"] for line in await _together(self._ask(request))]
        silent: dict[str, str] = {}
        for name, until in sorted(
            pair for one in done for pair in one["silent-destinations"].items()
        ):
            silent[name] = until  # the latest of them
        yield {
            "done": {
                "in-flight": sum(one["in-flight"] for one in done),
                "silent-destinations": silent,
            }
        }

    async def _log(self, request: Mapping[str, Any]) -> Answer:
        answers = self._ask(request)
        limit = request.get("limit")
        latest: deque[Line] = deque(maxlen=limit)
        async for line in _merged([_past(answer) for answer in answers], _time_of):
            if limit is None:
                yield line
            else:
                latest.append(line)
        for line in latest:
            yield line
        if request.get("follow") is True:
            async for line in _as_they_come(answers):
                yield line
        yield {"done": {}}


async def _one_by_one(answer: Answer) -> Answer:
    """The messages of a listing, and the line at its end."""
    async for line in answer:
        for item in line.get("items", [line]):
            yield item


def _exception_key(item: Line) -> tuple[str, str]:
    return item["at"], item["id"]


def _queue_id_of(item: Line) -> str:
    return str(item["queue-id"])


def _time_of(line: Line) -> float:
    return float(json.loads(line["line"])["timestamp"])


async def _past(answer: Answer) -> Answer:
    """The events up to now; the answer itself can be gone on with."""
    async for line in answer:
        if "line" not in line:
            return
        yield line


async def _merged(answers: Sequence[Answer], key: Callable[[Line], Any]) -> AsyncIterator[Line]:
    """Lines of sorted answers, sorted; lines without anything to sort by come at the end."""
    heads = [
        (answer, line) for answer in answers if (line := await anext(answer, None)) is not None
    ]
    while heads:
        sorting = [number for number, (_, line) in enumerate(heads) if "done" not in line]
        number = min(sorting, key=lambda one: key(heads[one][1])) if sorting else 0
        answer, line = heads[number]
        yield line
        following = await anext(answer, None)
        if following is None:
            del heads[number]
        else:
            heads[number] = (answer, following)


async def _together(answers: Sequence[Answer]) -> list[Line]:
    """The last line of each, all asked at once. All are waited for before any error is told."""

    async def last(answer: Answer) -> Line:
        return [line async for line in answer][-1]

    found = await asyncio.gather(*map(last, answers), return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


async def _as_they_come(answers: Sequence[Answer]) -> AsyncIterator[Line]:
    lines: asyncio.Queue[Line | RequestError] = asyncio.Queue(_WAITING_LINES)

    async def pump(answer: Answer) -> None:
        try:
            async for line in answer:
                if "line" in line:
                    await lines.put(line)
        except RequestError as error:
            await lines.put(error)

    pumps = [asyncio.create_task(pump(answer)) for answer in answers]
    try:
        while True:
            line = await lines.get()
            if isinstance(line, RequestError):
                raise line
            yield line
    finally:
        for task in pumps:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*pumps, return_exceptions=True)
