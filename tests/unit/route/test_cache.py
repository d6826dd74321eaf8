"""What is kept is kept for a time, and not more than so much of it."""

from __future__ import annotations

from relay.route.cache import ExpiringCache


def test_a_value_is_good_until_it_expires():
    cache = ExpiringCache[str](10)
    cache.put("a", "x", expires=5.0)
    assert cache.get("a", now=4.9) == "x"
    assert cache.get("a", now=5.0) is None
    assert len(cache) == 0


def test_least_recently_used_value_leaves_first():
    cache = ExpiringCache[str](2)
    cache.put("a", "x", expires=9.0)
    cache.put("b", "y", expires=9.0)
    cache.get("a", now=0.0)
    cache.put("c", "z", expires=9.0)
    assert [cache.get(key, now=0.0) for key in "abc"] == ["x", None, "z"]


def test_a_heavy_value_pushes_out_several_light_ones_and_one_too_heavy_is_not_kept():
    cache = ExpiringCache[str](10)
    for key in "abcde":
        cache.put(key, key, expires=9.0, weight=2)
    cache.put("f", "f", expires=9.0, weight=5)
    assert [key for key in "abcdef" if cache.get(key, now=0.0)] == ["d", "e", "f"]
    cache.put("g", "g", expires=9.0, weight=11)
    assert cache.get("g", now=0.0) is None
    assert cache.get("f", now=0.0) == "f"


def test_a_value_put_again_is_weighed_once():
    cache = ExpiringCache[str](3)
    for _ in range(5):
        cache.put("a", "x", expires=9.0, weight=2)
    cache.put("b", "y", expires=9.0)
    assert cache.get("a", now=0.0) == "x"
    assert cache.get("b", now=0.0) == "y"
    cache.clear()
    assert len(cache) == 0
