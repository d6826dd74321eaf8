"""What a record, a policy and a name in it say (RFC 8461), and when a policy is fetched."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.route.floor import NO_STS, StsFloor
from relay.route.mta_sts import (
    InvalidPolicy,
    KeptPolicy,
    Policy,
    StsMode,
    is_backing_off,
    is_pattern,
    matches,
    parse_policy,
    policy_domain,
    policy_host,
    record_id,
    record_name,
    refresh_due,
    wants_fetch,
)

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def kept(id: str = "1", *, max_age: timedelta = 7 * DAY, age: timedelta = DAY) -> KeptPolicy:
    policy = Policy(StsMode.ENFORCE, max_age, ("mx.example.net",), ())
    return KeptPolicy("example.net", id, policy, NOW - age, NOW)


# --- the policy domain ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipient_domain", "route_host", "domain"),
    [
        ("Example.NET.", None, "example.net"),
        ("mail.example.net", None, "mail.example.net"),  # no parent's policy
        ("bücher.example", None, "xn--bcher-kva.example"),
        ("example.net", "smarthost.example", "smarthost.example"),  # §3.4: never the recipient's
        ("example.net", "192.0.2.1", ""),
        ("example.net", "2001:db8::1", ""),
        ("[192.0.2.1]", None, ""),
        ("[IPv6:2001:db8::1]", None, ""),
    ],
)
def test_the_policy_domain_is_the_recipient_domain_or_the_host_of_its_route(
    recipient_domain: str, route_host: str | None, domain: str
) -> None:
    assert policy_domain(recipient_domain, route_host) == domain


def test_record_and_policy_are_at_names_below_the_policy_domain() -> None:
    assert record_name("example.net") == "_mta-sts.example.net"
    assert policy_host("example.net") == "mta-sts.example.net"


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "id"),
    [
        ([b"v=STSv1; id=20160831085700Z;"], "20160831085700Z"),
        ([b"v=STSv1;id=1"], "1"),
        ([b"v=STSv1; \tid=1\t ;"], "1"),
        ([b"v=STSv1; new=x; id=1; other"], "1"),  # other fields are ignored
        ([b"v=STSv1; id=1; id=2"], "1"),  # §3.2: the first counts
        ([b"v=STSv1; id=" + b"a" * 32], "a" * 32),
        ([b"v=spf1 -all", b"v=STSv1; id=1;"], "1"),  # records of others are dropped
        ([b"v=STSv2; id=2;", b"v=STSv1; id=1;"], "1"),
        ([], None),
        ([b"v=spf1 -all"], None),
        ([b"v=STSv1; id=1;", b"v=STSv1; id=1;"], None),  # exactly one
        ([b"v=STSv1; id=1;", b"v=STSv1;"], None),
        ([b"v=STSv1"], None),
        ([b"v=STSv1;"], None),
        ([b"v=STSv1; id="], None),
        ([b"v=STSv1; id=" + b"a" * 33], None),
        ([b"v=STSv1; id=a-b"], None),
        ([b"v=STSv1; id=a b"], None),
        ([b"v=STSv1; id=\xc3\xa4"], None),
        ([b"v=STSv1; id=!; id=1"], None),  # the first counts, and it is none
        ([b"v=STSv1; ID=1"], None),
        ([b"v=stsv1; id=1"], None),
        ([b" v=STSv1; id=1"], None),
        ([b"v=STSv1 ; id=1"], None),
        ([b"id=1; v=STSv1;"], None),
    ],
)
def test_a_record_tells_of_a_policy_by_its_id(texts: list[bytes], id: str | None) -> None:
    assert record_id(texts) == id


@given(st.lists(st.binary() | st.binary().map(lambda text: b"v=STSv1;" + text)))
def test_no_record_is_an_error(texts: list[bytes]) -> None:
    found = record_id(texts)
    assert found is None or (found.isascii() and found.isalnum() and len(found) <= 32)


# --- the policy -----------------------------------------------------------------------------------

ENFORCE = "version: STSv1\nmode: enforce\nmx: mx.example.net\nmax_age: 86400\n"


def test_a_policy_has_a_mode_an_age_and_its_hosts() -> None:
    text = b"version: STSv1\r\nmode: enforce\r\nmx: MX1.Example.net\r\nmx: *.example.net\r\n"
    assert parse_policy(text + b"max_age: 604800\r\n") == Policy(
        StsMode.ENFORCE,
        timedelta(weeks=1),
        ("mx1.example.net", "*.example.net"),
        (
            "version: STSv1",
            "mode: enforce",
            "mx: MX1.Example.net",
            "mx: *.example.net",
            "max_age: 604800",
        ),
    )


@pytest.mark.parametrize(
    "text",
    [
        ENFORCE,
        ENFORCE.replace("\n", "\r\n"),
        ENFORCE.replace("\n", "\r\n", 2),  # both ends of line in one policy
        ENFORCE.rstrip("\n"),
        ENFORCE.replace(": ", ":"),
        ENFORCE.replace(": ", " \t:\t "),
        ENFORCE.replace("\n", " \t\n"),
        "\n".join(reversed(ENFORCE.splitlines())),
        ENFORCE + "extension: x\n",
        ENFORCE + "\n",
        ENFORCE + "mode: testing\nversion: STSv2\nmax_age: 1\n",  # the first counts
        ENFORCE + "mx: mx.example.net.\n",  # the same name once more
        ENFORCE + "mx: 192.0.2.1\nmx: [192.0.2.1]\nmx: *\nmx: m*.example.net\nmx: a..b\nmx:\n",
    ],
)
def test_a_policy_may_be_written_in_more_than_one_way(text: str) -> None:
    policy = parse_policy(text.encode())
    assert policy.mode is StsMode.ENFORCE
    assert policy.mx == ("mx.example.net",)
    assert policy.max_age == DAY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>version: STSv1</html>",
        ENFORCE.replace("STSv1", "STSv2"),
        ENFORCE.replace("STSv1", "stsv1"),
        ENFORCE.replace("version: STSv1\n", ""),
        ENFORCE.replace("version:", "Version:"),
        ENFORCE.replace("mode: enforce\n", ""),
        ENFORCE.replace("enforce", "Enforce"),
        ENFORCE.replace("enforce", "report"),
        ENFORCE.replace("max_age: 86400\n", ""),
        ENFORCE.replace("86400", ""),
        ENFORCE.replace("86400", "-1"),
        ENFORCE.replace("86400", "1.5"),
        ENFORCE.replace("86400", "1d"),
        ENFORCE.replace("86400", "²"),
        ENFORCE.replace("mx: mx.example.net\n", ""),
        ENFORCE.replace("mx: mx.example.net", "mx: 192.0.2.1"),
        ENFORCE.replace("mx: mx.example.net", "mx: *.*.example.net"),
        ENFORCE.replace("enforce", "testing").replace("mx: mx.example.net\n", ""),
        ENFORCE.replace("\n", "\r"),
        ENFORCE + "x: " + "y" * 64 * 1024,
    ],
)
def test_a_text_that_lacks_something_is_no_policy(text: str) -> None:
    with pytest.raises(InvalidPolicy):
        parse_policy(text.encode())


def test_mode_none_needs_no_hosts() -> None:
    policy = parse_policy(b"version: STSv1\nmode: none\nmax_age: 60\n")
    assert (policy.mode, policy.mx) == (StsMode.NONE, ())


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("0", 0),
        ("86400", 86_400),
        ("0000000000086400", 86_400),
        ("31557600", 31_557_600),
        ("31557601", 31_557_600),
        ("9" * 60_000, 31_557_600),
    ],
)
def test_max_age_is_at_most_a_year(written: str, seconds: int) -> None:
    text = ENFORCE.replace("86400", written)
    assert parse_policy(text.encode()).max_age == timedelta(seconds=seconds)


@given(st.binary() | st.text(alphabet="version: STSmodxag_1\r\n\t*.0").map(str.encode))
def test_any_text_is_a_policy_with_an_age_or_an_invalid_one(body: bytes) -> None:
    with suppress(InvalidPolicy):
        assert timedelta(0) <= parse_policy(body).max_age <= timedelta(seconds=31_557_600)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "is_named"),
    [
        ("mx.example.net", "mx.example.net", True),
        ("mx.example.net", "MX.Example.net.", True),
        ("mx.example.net", "mx2.example.net", False),
        ("mx.example.net", "a.mx.example.net", False),
        ("*.example.net", "mx.example.net", True),
        ("*.example.net", "MX.EXAMPLE.NET.", True),
        ("*.example.net", "example.net", False),
        ("*.example.net", ".example.net", False),
        ("*.example.net", "a.mx.example.net", False),
        ("*.example.net", "mx.example.net.evil.example", False),
        ("*.net", "example.net", True),
        ("example.net", "net", False),
        ("*.example.net", "", False),
    ],
)
def test_a_star_is_exactly_one_label(pattern: str, name: str, is_named: bool) -> None:
    assert matches((pattern,), name) is is_named
    assert StsFloor(mode=StsMode.ENFORCE, mx=("other.example", pattern)).names(name) is is_named


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("mx.example.net", True),
        ("*.example.net", True),
        ("*", False),
        ("*.", False),
        ("**.example.net", False),
        ("mx.*.net", False),
        ("192.0.2.1", False),
        ("[192.0.2.1]", False),
        ("*.[192.0.2.1]", False),
        ("", False),
    ],
)
def test_mx_pattern_is_a_name_or_one_wildcard_label(text: str, is_one: bool) -> None:
    assert is_pattern(text) is is_one


# --- when to fetch --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "record", "failed", "fetches"),
    [
        (None, None, None, False),
        (None, "1", None, True),
        (kept("1"), "1", None, False),
        (kept("1"), "2", None, True),
        (kept("1"), None, None, False),
        (kept("1", age=8 * DAY), "1", None, True),  # expired
        (kept("1", age=8 * DAY), None, None, False),
        (kept("1", age=7 * DAY), "1", None, True),  # the moment it expires
        (kept("1", max_age=timedelta(0), age=timedelta(0)), "1", None, True),  # holds for once
        (None, "1", NOW, False),
        (None, "1", NOW - timedelta(minutes=4, seconds=59), False),
        (None, "1", NOW - timedelta(minutes=5), True),
        (kept("1"), "2", NOW - timedelta(minutes=1), False),
        (None, "1", NOW + timedelta(hours=1), True),  # the clock was set back
    ],
)
def test_policy_is_fetched_for_an_attempt_only_if_it_is_new_or_due(
    policy: KeptPolicy | None, record: str | None, failed: datetime | None, fetches: bool
) -> None:
    assert wants_fetch(policy, record, failed=failed, now=NOW) is fetches


def test_a_policy_holds_until_its_age_is_over() -> None:
    policy = kept(max_age=DAY, age=timedelta(0))
    assert policy.expires == NOW + DAY
    assert policy.is_in_force(NOW + DAY - timedelta(seconds=1))
    assert not policy.is_in_force(NOW + DAY)


def test_back_off_lasts_five_minutes() -> None:
    assert not is_backing_off(None, now=NOW)
    assert is_backing_off(NOW, now=NOW)
    assert not is_backing_off(NOW - timedelta(minutes=5), now=NOW)


@pytest.mark.parametrize(
    ("lasts", "earliest", "latest"),
    [
        (timedelta(weeks=1), timedelta(hours=12), timedelta(hours=24)),
        (timedelta(hours=10), timedelta(hours=5), timedelta(hours=10)),  # before it expires
        (timedelta(minutes=1), timedelta(minutes=30), timedelta(hours=1)),  # never all the time
    ],
)
def test_a_policy_is_refetched_at_a_random_moment_of_each_day(
    lasts: timedelta, earliest: timedelta, latest: timedelta
) -> None:
    assert refresh_due(NOW + lasts, now=NOW, jitter=0) == NOW + earliest
    assert refresh_due(NOW + lasts, now=NOW, jitter=1) == NOW + latest


# --- the floor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "holds", "is_looked_at"),
    [
        (StsMode.ENFORCE, True, True),
        (StsMode.TESTING, False, True),
        (StsMode.NONE, False, False),
        (None, False, False),
    ],
)
def test_mail_is_held_to_a_policy_of_mode_enforce_alone(
    mode: StsMode | None, holds: bool, is_looked_at: bool
) -> None:
    floor = StsFloor("example.net", mode)
    assert (floor.holds, floor.is_looked_at) == (holds, is_looked_at)


def test_no_policy_names_no_host() -> None:
    assert not NO_STS.names("mx.example.net")
