"""What every test may ask for.

`@pytest.mark.needs("postfix", ...)` names the programs of the operating system a
test runs. Where one is missing the test is skipped and says so; under
RELAY_REQUIRE_TOOLS=1 (as in .ci/run) that is a failure, so that nothing is
skipped unseen.

`make test` runs two processes: tests/system, which starts servers, goes one after the other in
one, since some of it measures; the rest goes by file in the other.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.rigs import postgres

_SBIN = ("/usr/sbin", "/sbin", "/usr/local/sbin")


def _find(program: str) -> str | None:
    if program == "root":
        return "root" if os.geteuid() == 0 else None
    if program == "postgresql":
        return postgres.program("initdb")
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "torture: a short form of a long sweep; `make torture` runs the long one"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which tests stay together (`--dist loadgroup`)."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        is_system = "system" in item.path.relative_to(config.rootpath).parts
        item.add_marker(pytest.mark.xdist_group("servers" if is_system else str(item.path)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that pytest-xdist does not know would let servers meet at their ports."""
    grouped = getattr(session.config.option, "loadgroup", False)
    if grouped and any("@" not in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not see the groups of tests/conftest.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    missing = [program for program in wanted if _find(program) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)} from the operating system"
    if os.environ.get("RELAY_REQUIRE_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
