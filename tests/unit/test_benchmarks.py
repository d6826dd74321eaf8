"""The arithmetic of the benchmarks, and what their words mean.

The measurement itself is tested with real servers, in tests/system.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.before import beyond_noise, pair_ratios, tables
from benchmarks.mixture import arriving, recipient
from benchmarks.peers import Durability, read_trace
from benchmarks.report import table
from benchmarks.run import Result
from benchmarks.soak import Minute, comparison, reference
from benchmarks.words import Measurement, Words, read_words


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ([], Words()),
        (["quick"], Words(is_quick=True)),
        (["nodes", "minutes=2.5"], Words(Measurement.NODES, minutes=2.5)),
        (["million"], Words(Measurement.MILLION)),
        (["against=9c37b97"], Words(Measurement.BEFORE, commit="9c37b97")),
        (["quick", "against=HEAD~3"], Words(Measurement.BEFORE, True, "HEAD~3")),
    ],
)
def test_words_say_what_is_measured(words: list[str], meaning: Words) -> None:
    assert read_words(words) == meaning


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["quik"],
            "quik: unknown; write one of million, nodes, peers, quick, soak, against=…, minutes=…",
        ),
        (["quick=yes"], "quick=yes: unknown"),
        (["against"], "against: unknown"),
        (["against="], "against=: write the commit behind it"),
        (["nodes", "against=HEAD"], "against=HEAD: not together with nodes"),
        (["nodes", "quick"], "quick: not together with nodes"),
        (["million", "minutes=5"], "minutes=: not together with million"),
        (["minutes=soon"], "minutes=soon: write a number"),
        (["minutes=0"], "minutes=0: write a number"),
        (["minutes=inf"], "minutes=inf: write a number"),
    ],
)
def test_words_that_cannot_be_kept_are_named_with_the_cure(words: list[str], named: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(named)):
        read_words(words)


def test_ratio_is_taken_of_each_pair_of_rounds() -> None:
    assert pair_ratios([100, 200, 400], [110, 100, 400]) == [1.1, 0.5, 1.0]


def test_round_without_its_partner_has_no_ratio() -> None:
    assert pair_ratios([100, 200], [150]) == [1.5]


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.9, 0.95, 0.99, 0.98], "less"),
        ([1.01, 1.2, 1.02, 1.1], "more"),
        ([0.9, 0.95, 1.0, 0.98], ""),
        ([0.5, 0.5, 0.5], ""),  # three pairs agree by chance one time in four
    ],
)
def test_difference_is_beyond_noise_where_all_pairs_agree_and_are_enough(
    ratios: list[float], verdict: str
) -> None:
    assert beyond_noise(ratios) == verdict


def _result(side: str, seconds: float, *, is_metered: bool = False) -> Result:
    return Result("series", side, 100, 100, seconds, seconds, 0.2, is_metered=is_metered)


def test_metered_round_does_not_count_for_the_ratio() -> None:
    results = [_result(side, 9.0, is_metered=True) for side in ("relay before", "Postfix")]
    for _ in range(4):
        results += [_result("relay before", 1.0), _result("relay now", 0.5)]
        results.append(_result("Postfix", 2.0))
    row = tables(results).splitlines()[2]
    assert row.startswith(
        "| 4 KiB, one sender in series | 100 | 200 | 50 | **2.00** | 2.00 to 2.00 "
    )


_WAITS = """\
7 sendto(5, "354 Go o"..., 20, MSG_NOSIGNAL, NULL, 0) = 20
8 fsync(12)                         = 0
9 fdatasync(3 <unfinished ...>
8 write(4, "something"..., 9)       = 9
9 <... fdatasync resumed>)          = 0
7 writev(5, [{iov_base="250 2.0."..., iov_len=40}], 1) = 40
8 fsync(12)                         = 0
"""
_TRUSTS = """\
7 write(5, "354 Go o"..., 20)       = 20
8 fsync(12 <unfinished ...>
7 write(5, "250 2.0."..., 20)       = 20
8 <... fsync resumed>)              = 0
7 write(5, "250 2.1."..., 20)       = 20
"""


@pytest.mark.parametrize(
    ("trace", "durability"),
    [
        (_WAITS, Durability(2, 3)),
        (_TRUSTS, Durability(0, 1)),
        (_WAITS + _TRUSTS, Durability(1, 2)),
        (_WAITS.replace("= 0", "= -1 EIO (Input/output error)"), Durability(0, 0)),
    ],
)
def test_sync_counts_for_a_reply_that_waited_for_its_end(
    trace: str, durability: Durability
) -> None:
    assert read_trace(trace.splitlines()) == durability


def test_trace_without_a_message_says_nothing_about_durability() -> None:
    with pytest.raises(AssertionError, match="no message"):
        read_trace(['7 write(5, "220 sink"..., 20) = 20'])


def test_each_tenth_of_the_mixture_has_its_place() -> None:
    zones = [recipient(number).split(".")[-2] for number in range(1000, 2000)]
    assert zones.count("known") == 400
    assert sum(zone.startswith("new") for zone in zones) == 400
    assert zones.count("slow") == 100
    assert (zones.count("silent"), zones.count("refused")) == (50, 50)
    assert arriving(range(1000, 2000)) == 900


def test_new_domain_of_the_mixture_gets_two_messages() -> None:
    domains = Counter(recipient(number) for number in range(10_000) if 4 <= number % 10 < 8)
    assert set(domains.values()) == {2}


@pytest.mark.parametrize(("minutes", "number"), [(2, 1), (5, 2), (10, 5), (60, 5)])
def test_last_minute_is_compared_with_minute_five_or_the_middle(minutes: int, number: int) -> None:
    assert reference(minutes) == number


def test_soak_shows_both_minutes_and_their_ratio() -> None:
    steady = Minute(80.0, 30, 8, 4.0, 500, 1000, 2.0, 0.8, 2.0, 10.0, 3.0, 12.0)
    grown = replace(steady, rss_mib=120.0, queued=0)
    lines = comparison([steady, steady, grown, grown]).splitlines()
    assert lines[0] == "| | minute 2 | minute 4 | ratio |"
    assert "| resident memory, MiB | 80 | 120 | 1.50 |" in lines
    assert "| threads | 8 | 8 | 1.00 |" in lines


def test_table_without_rows_is_empty_text() -> None:
    assert table(["", "a"], []) == ""
    assert table(["", "a"], [["x", "1"]]) == "| | a |\n|---|---:|\n| x | 1 |"
