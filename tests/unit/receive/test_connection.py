"""What is used of aiosmtpd, and what is overridden: a release that changes one of these names is to
be noticed here.
"""

from __future__ import annotations

import asyncio
import inspect
import re

import pytest
from aiosmtpd.proxy_protocol import get_proxy
from aiosmtpd.smtp import SMTP

from relay.receive.connection import Connection


@pytest.mark.parametrize(
    "name", ["connection_made", "data_received", "eof_received", "connection_lost", "_timeout_cb"]
)
def test_a_method_that_is_overridden_is_there(name: str):
    assert callable(getattr(SMTP, name))
    assert getattr(Connection, name) is not getattr(SMTP, name)


@pytest.mark.parametrize("name", ["pause_writing", "resume_writing"])
def test_flow_control_is_told_to_a_protocol(name: str):
    assert callable(getattr(SMTP, name))


def test_no_name_of_ours_hides_another_of_aiosmtpd():
    ours = {name for name in vars(Connection) if not name.startswith("__")}
    overridden = {"connection_made", "data_received", "eof_received", "connection_lost"}
    overridden |= {"pause_writing", "resume_writing", "_timeout_cb"}
    assert {name for name in ours if hasattr(SMTP, name)} == overridden


async def test_state_of_a_session_can_be_made_once_and_has_no_name_of_ours():
    state = vars(SMTP(None, loop=asyncio.get_running_loop(), hostname="", timeout=0))
    assert state["loop"] is asyncio.get_running_loop()
    ours = set(re.findall(r"self\.(_\w+)\b(?:: [^=\n]+)? =", inspect.getsource(Connection)))
    assert {"_listener", "_protocol", "_work"} <= ours
    assert not ours & set(state)


def test_get_proxy_reads_a_header_from_a_stream():
    assert list(inspect.signature(get_proxy).parameters) == ["reader_func"]
