"""What every test may ask for.

`@pytest.mark.needs("postfix", ...)` names the programs of the operating system a
test runs. Where one is missing the test is skipped and says so; under
RELAY_REQUIRE_TOOLS=1 (as in .ci/run) that is a failure, so that nothing is
skipped unseen.

`make test` runs several processes, and the tests of a file stay together: they share servers,
and addresses of their own. Ports differ between the processes (`tests.rigs.ports`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from relay.daemon.files import raise_limit
from tests.fakes.waiting import patient
from tests.rigs import postgres

# An example takes as long as the machine is busy: what a test states has no seconds in it.
settings.register_profile(
    "relay", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("relay")

_FILES = 20_000
"""A table of tests has a thousand hosts; most users may open 1,024 files unless they ask."""
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
    raise_limit(_FILES)
    # Tests start some hundred relays: none of them has to compile itself.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/system comes first: its files take minutes, and one of them alone at the end, too."""
    items.sort(key=lambda item: "system" not in item.path.parts)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout reads it
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The limit for a whole test is one of a machine that does nothing else, too."""
    if item.config.getoption("timeout") is None:
        mark = item.get_closest_marker("timeout")
        seconds = mark.args[0] if mark else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
    return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    missing = [program for program in wanted if _find(program) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)} from the operating system"
    if os.environ.get("RELAY_REQUIRE_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
