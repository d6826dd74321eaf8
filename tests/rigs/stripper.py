"""A man in the middle: between the relay and a mail host, with STARTTLS taken out or not.

It stands at the host's address, passes every octet on, and writes down what came from the relay.
Once it strips, it breaks off what is open, and from then on hides STARTTLS in what the host says,
as firewalls that inspect SMTP do.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_STARTTLS = re.compile(rb"STARTTLS", re.IGNORECASE)


class Stripper:
    """`from_relay`: all that the relay sent, connection by connection, since `forget`."""

    def __init__(self, host: tuple[str, int]) -> None:
        self.from_relay: list[bytearray] = []
        self._host = host
        self._strips = False
        self._open: set[asyncio.StreamWriter] = set()

    def strip(self, strips: bool = True) -> None:
        """From now on, or no more; open connections are broken off."""
        self._strips = strips
        self.from_relay.clear()
        for writer in self._open:
            writer.transport.abort()

    @property
    def said(self) -> bytes:
        """All that the relay said."""
        return b"".join(self.from_relay)

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        said = bytearray()
        self.from_relay.append(said)
        answers, words = await asyncio.open_connection(*self._host)
        self._open |= {writer, words}
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._way(reader, words, said))
                ways.create_task(self._way(answers, writer, None))
        except* OSError:
            pass
        finally:
            for end in (writer, words):
                self._open.discard(end)
                end.close()

    async def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytearray | None
    ) -> None:
        while octets := await reader.read(65536):
            if said is not None:
                said += octets
            elif self._strips:
                octets = _STARTTLS.sub(b"XXXXXXXA", octets)
            writer.write(octets)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def stripper(at: tuple[str, int], host: tuple[str, int]) -> AsyncIterator[Stripper]:
    """A man in the middle at an address, in front of a host."""
    man = Stripper(host)
    server = await asyncio.start_server(man.pass_on, *at)
    try:
        yield man
    finally:
        server.close()
        man.strip(False)
