"""MTA-STS policies in the real relay, as its operator sees them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relay.sandbox.policy_host import WebAnswer, policy
from tests.rigs.policies import open_world

pytestmark = pytest.mark.slow


async def test_operator_lists_refreshes_and_forgets_policies(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        web = await world.publish("a.test", policy("mx.a.test", "*.a.test"))
        await world.start()
        assert await world.run("mta-sts", "list") == (0, "No policy is kept.\n", "")
        code, out, _ = await world.run("mta-sts", "refresh", "A.test")
        assert code == 0
        assert "mx:       *.a.test" in out
        code, out, _ = await world.run("mta-sts", "list")
        assert out == "enforce  a.test  mx.a.test, *.a.test  expires in 6d\n"
        web.answer = WebAnswer(status=500)
        code, out, err = await world.run("mta-sts", "refresh", "a.test")
        assert code == 1
        assert "mode:     enforce" in out  # in force all the same
        assert err == "not fetched: mta-sts.a.test answers with status 500\n"

        assert world.sandbox.relay is not None
        world.sandbox.relay.kill()
        await asyncio.to_thread(world.sandbox.relay.start)
        assert (await world.run("mta-sts", "show", "a.test"))[0] == 0  # it outlives us
        said = "forgotten: the policy of a.test\n"
        assert (await world.run("mta-sts", "forget", "a.test")) == (0, said, "")
        code, out, err = await world.run("mta-sts", "show", "a.test")
        assert (code, err) == (1, "a.test: no policy is kept\n")
