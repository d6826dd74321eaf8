"""What the libraries alone cost: aiosmtpd accepts a message, aiosmtplib sends it to the next hop.

    python -m benchmarks.bare PORT HOP_ADDRESS HOP_PORT

There is no queue, sync, log, policy or retry: a message is in memory, and lost with the process.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import aiosmtplib
import uvloop
from aiosmtpd.smtp import SMTP, Envelope, Session

_CONNECTIONS = 20


class _Handler:
    def __init__(self, queue: asyncio.Queue[Envelope]) -> None:
        self._queue = queue

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        self._queue.put_nowait(envelope)
        return "250 2.0.0 Ok"


async def _hand_on(queue: asyncio.Queue[Envelope], address: str, port: int) -> None:
    async with aiosmtplib.SMTP(hostname=address, port=port, start_tls=False) as client:
        while True:
            envelope = await queue.get()
            await client.sendmail(
                envelope.mail_from or "", envelope.rcpt_tos, envelope.content or b""
            )


async def _serve(port: int, hop_address: str, hop_port: int) -> None:
    queue: asyncio.Queue[Envelope] = asyncio.Queue()
    handler = _Handler(queue)
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: SMTP(handler, hostname="bare"), "127.0.0.1", port)
    await asyncio.gather(*(_hand_on(queue, hop_address, hop_port) for _ in range(_CONNECTIONS)))


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
