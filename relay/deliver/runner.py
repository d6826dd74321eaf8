"""Runs the attempt of one claimed entry under the current rules, and returns its result. †"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Protocol

from relay.deliver.content import Stored
from relay.deliver.destinations import NotNow
from relay.deliver.sts_policies import PolicyPending
from relay.mail.outcome import Code, Deferred, Outcome
from relay.mail.record import replace
from relay.mail.tls_session import TlsSession
from relay.policy.rules import PolicyRules, reconsider
from relay.queue.entry import Entry
from relay.queue.store import CHUNK_BYTES, ClaimLost, ContentFile, DeliveryQueue

logger = logging.getLogger(__name__)


class Attempts(Protocol):
    """What makes an attempt: `relay.deliver.attempt.Attempt`.

    Cancelled before the final dot it ends with CancelledError; after it, it stays for the answer
    and returns the outcomes, since nobody else will ever hear them. An attempt that cannot begin
    yet raises `PolicyPending`, or `NotNow`. What reports on TLS count is added to `sessions`,
    however it ends.
    """

    async def run(
        self, entry: Entry, content: Callable[[], AsyncIterator[bytes]], sessions: list[TlsSession]
    ) -> Mapping[int, Outcome]: ...


class Runner:
    """Runs attempts, each in a task of its caller."""

    def __init__(
        self, store: DeliveryQueue, attempts: Attempts, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._attempts = attempts
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(
        self, entry: Entry, sessions: list[TlsSession]
    ) -> Mapping[int, Outcome] | NotNow | datetime:
        """The outcomes of an attempt; or why there are none; or when the entry is due again.

        Any error inside is the relay's own trouble and temporary: the message is not lost, and not
        tried again at once.
        """
        task, begun = asyncio.current_task(), self._clock()
        assert task is not None
        self._tasks.add(task)
        try:
            content = Stored(partial(self._content, entry), partial(self._file, entry))
            return await self._attempts.run(entry, content, sessions)
        except asyncio.CancelledError:
            task.uncancel()
            return begun
        except ClaimLost as lost:
            logger.warning("%s: broken off for %s: %s", entry.message.queue_id, entry.domain, lost)
            return begun
        except PolicyPending as pending:
            return pending.until
        except NotNow as not_now:
            return not_now
        except Exception as exc:
            name = type(exc).__name__
            logger.exception(
                "%s: the attempt for %s failed in us", entry.message.queue_id, entry.domain
            )
            trouble = Deferred("4.3.0", Code.NONE, "", f"internal trouble ({name})")
            return {recipient.index: trouble for recipient in entry.recipients}
        finally:
            self._tasks.discard(task)

    def break_off(self, tasks: Iterable[asyncio.Task[None]] | None = None) -> None:
        """End attempts that have not come to the final dot: all, or those of some tasks."""
        for task in list(self._tasks if tasks is None else self._tasks.intersection(tasks)):
            task.cancel()

    async def _content(self, entry: Entry) -> AsyncIterator[bytes]:
        """The content in pieces, from memory where it still is."""
        if entry.content is None:
            async for piece in self._store.read_content(entry.message.queue_id):
                yield piece
            return
        for begin in range(0, len(entry.content), CHUNK_BYTES):
            yield entry.content[begin : begin + CHUNK_BYTES]

    async def _file(self, entry: Entry) -> ContentFile | None:
        """The file of the content, where all of it is sent as it is stored."""
        message = entry.message
        return await self._store.open_content(message.queue_id) if message.is_dotless else None


def reconsidered(entry: Entry, rules: PolicyRules) -> Entry:
    """The entry, with its settings as strict as the current rules require."""
    sender, domain = entry.message.reverse_path, entry.domain
    recipients = []
    for one in entry.recipients:
        now = reconsider(one.settings, rules, reverse_path=sender, recipient_domain=domain)
        recipients.append(one if now is one.settings else replace(one, settings=now))
    stricter = tuple(recipients)
    return entry if stricter == entry.recipients else replace(entry, recipients=stricter)
