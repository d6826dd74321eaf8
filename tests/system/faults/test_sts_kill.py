"""kill -9 while an MTA-STS policy is written: the old one is in force, or the new one, whole."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from relay.sandbox.policy_host import policy
from tests.rigs.policies import World, open_world
from tests.rigs.strace import strace

pytestmark = [pytest.mark.needs("strace"), pytest.mark.torture, pytest.mark.timeout(300)]

DOMAIN = "a.test"


async def test_kill_9_while_a_policy_is_written_leaves_the_old_one_or_the_new(
    tmp_path: Path, long_form: bool
) -> None:
    sweep = (("pwrite64", 14, (3, 9)), ("fdatasync", 5, (2,)), ("unlink", 1, (1,)))
    calls = [
        (call, nth)
        for call, most, few in sweep
        for nth in (range(1, most + 1) if long_form else few)
    ]
    died = 0
    async with open_world(tmp_path) as world:
        web = await world.publish(DOMAIN, policy("mx0.a.test"), id="0")
        await world.start()
        assert (await world.run("mta-sts", "refresh", DOMAIN))[0] == 0
        for number, (call, nth) in enumerate(calls, 1):
            world.record(DOMAIN, str(number), ttl=0)
            web.answer = policy(f"mx{number}.a.test")
            died += await killed_in_refresh(world, call, nth)
            assert await in_force(world) in (number - 1, number), f"{call} {nth}"
            assert (await world.run("mta-sts", "refresh", DOMAIN))[0] == 0
            assert await in_force(world) == number
    sys.stderr.write(f"\nkill -9 while a policy is written: {len(calls)} rounds, {died} killed\n")
    assert died >= len(calls) * 0.6, "the kills come too late to mean anything"


async def killed_in_refresh(world: World, call: str, nth: int) -> bool:
    """Let the relay fetch, and die at its N-th call; it is running again in the end."""
    relay = world.sandbox.relay
    assert relay is not None
    assert relay.process is not None
    with strace(relay.pid, calls=call, inject=f"signal=KILL:when={nth}") as tracer:
        await world.run("mta-sts", "refresh", DOMAIN)
        await asyncio.sleep(0.1)
        died = tracer.poll() is not None
    if died:
        await asyncio.to_thread(relay.process.wait, 30)
        await asyncio.to_thread(relay.start)
    return died


async def in_force(world: World) -> int:
    """The number of the policy that is kept: its id and its text are of one."""
    code, out, err = await world.run("mta-sts", "show", DOMAIN, "--json")
    assert code == 0, err
    kept = json.loads(out)
    assert kept["mx"] == [f"mx{kept['id']}.a.test"]
    return int(kept["id"])
