"""What all messages that are coming in hold together stays small, whatever comes."""

from __future__ import annotations

import asyncio

from relay.queue.store import CHUNK_BYTES, STAGE_BYTES
from relay.receive.buffered import SMALL_BYTES, Buffered
from tests.fakes.client import Client
from tests.fakes.waiting import patient
from tests.unit.receive.conftest import Desk

MIB = 1024 * 1024


async def settled(buffered: Buffered, held: int) -> None:
    async with asyncio.timeout(patient(10)):
        while buffered.held_bytes != held:
            await asyncio.sleep(0.01)


async def sending(desk: Desk) -> tuple[Client, Buffered]:
    """A client in the middle of a message of which 100,000 octets are held."""
    client = await desk.client()
    await client.begin()
    assert (await client.say("DATA")).startswith("354")
    await client.send(b"x" * 100_000)
    assert desk.reception is not None
    await settled(desk.reception.buffered, 100_000)
    return client, desk.reception.buffered


async def test_memory_of_a_message_is_counted_until_its_end(desk: Desk) -> None:
    client, buffered = await sending(desk)
    await client.send(b"\r\n.\r\n")
    assert (await client.reply()).startswith("250")
    assert buffered.held_bytes == 0


async def test_client_that_vanishes_holds_no_memory(desk: Desk) -> None:
    client, buffered = await sending(desk)
    client.vanish()
    await settled(buffered, 0)


async def test_pieces_are_smaller_while_much_is_held(desk: Desk) -> None:
    client = await desk.client()
    assert desk.reception is not None
    desk.reception.buffered = Buffered(total_bytes=2 * SMALL_BYTES)
    desk.reception.buffered.held_bytes = SMALL_BYTES
    content = b"Subject: x\r\n\r\n" + b"line\r\n" * 100_000
    await client.begin()
    assert (await client.data(content + b".\r\n")).startswith("250")
    assert desk.store.contents[0].endswith(content)
    assert desk.reception.buffered.held_bytes == SMALL_BYTES


async def test_a_long_header_section_is_not_waited_for_when_memory_is_full(desk: Desk) -> None:
    client, other = await desk.client(), await desk.client()
    assert desk.reception is not None
    desk.reception.buffered = Buffered(total_bytes=MIB)
    desk.reception.buffered.held_bytes = MIB
    await client.begin()
    assert (await client.data(b"X: y\r\n" * 50_000 + b"\r\n.\r\n")).startswith("452 4.3.1")
    await other.begin()
    assert (await other.data(b"Subject: x\r\n\r\n" + b"y" * 500_000 + b"\r\n.\r\n")).startswith(
        "250"
    )
    assert desk.reception.buffered.held_bytes == MIB


def test_memory_for_all_messages_is_bounded() -> None:
    buffered = Buffered(total_bytes=1000)
    assert (buffered.piece_bytes, buffered.is_full) == (STAGE_BYTES, False)
    buffered.held_bytes = 250
    assert (buffered.piece_bytes, buffered.is_full) == (CHUNK_BYTES, False)
    buffered.held_bytes = 500
    assert (buffered.piece_bytes, buffered.is_full) == (SMALL_BYTES, False)
    buffered.held_bytes = 1000
    assert buffered.is_full
