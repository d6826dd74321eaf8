"""The JSON Schema, `relay check` and the reference say the same of every key."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import Config
from relay.config.conform import Conformer, build
from relay.config.schema import json_schema
from relay.config.shape import Choice, Section, Shape, known_keys, section_of
from relay.config.tree import Composer
from relay.config.words import WORDS
from relay.mail.option import TextForm

ROOT = Path(__file__).resolve().parents[2]
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaOBGJ"
DIGEST = "A" * 43 + "="
SCHEMA = json_schema()
VALIDATOR = jsonschema_rs.validator_for(SCHEMA)

BASE: dict[str, Any] = {
    "hostname": "relay.example.net",
    "listeners": [{"address": "127.0.0.1:2525"}],
    "access": {"networks": [], "users": {"*": {"password": HASH, "sender_domains": ["a.example"]}}},
    "policy": {"default": {}, "domains": {"a.example": {}}, "destinations": {"a.example": {}}},
    "routes": {"a.example": {"hosts": [["b.example"]], "pin_sha256": [DIGEST], "auth": {}}},
    "routes_by_sender": {"a.example": {"hosts": [["b.example"]]}},
    "next_hops": {"hop": {"hosts": [["b.example"]], "pin_sha256": [DIGEST], "auth": {}}},
    "oauth2": {"login": {"grant": "refresh_token"}},
    "dkim": {"domains": {"a.example": {"selector": "s", "key_file": "f"}}},
    "admin": {"web": {"users": {"alice": {"password": HASH}}}},
}
"""A configuration with one of each list and of each map, to be changed at one place."""

VALUES: list[Any] = [
    *(None, True, False, "true", "false", "yes", "No", "ON", "maybe", ""),
    *(0, 1, -1, 2, 25, 64, 65, 65535, 65536, 99999999, 10**12 - 1, 10**12, 10**15, 1.5),
    *("1", "-1", "0", "007", "5m", "0s", "0s0ms", "5 m", "1h30m", "30m1h", "5m5m", "250ms", "2w1d"),
    *("10000d", "9999d", "never", "Never", "64KiB", "0KiB", "-1KiB", "50MB", "1.5MiB", "9" * 16),
    *([], [None], [[]], [{}], {}, {"x": 1}, {"": None}, ["a.example"], ["5m"], ["10.0.0.0/8"]),
    *(
        "a.example",
        "A.example.",
        "*.a.example",
        "*",
        "a..b",
        "-a.example",
        "a b",
        "@a.example",
        "a.1",
    ),
    *("bücher.example", "[192.0.2.1]", "[IPv6:::1]", "127.0.0.1", "[::1]", "::1", "fe80::1%eth0"),
    *("127.0.0.1:25", "[::1]:25", "::1:25", "*:25", ":25", "localhost:25", "127.0.0.1:65536"),
    *("127.0.0.1:025", "127.0.0.1:", "unix:/run/x", "unix:", "unix:" + "x" * 108, "256.0.0.1:1"),
    *("10.0.0.0/8", "10.0.0.0/33", "2001:db8::/32", "::/129", "10.0.0", "10.0.0.0/255.0.0.0"),
    *("::ffff:10.0.0.0/104", "/etc/relay/x", "none", "starttls", "info", "TLSv1.2", "tlsv1.2"),
    *(
        "0600",
        "660",
        "0800",
        HASH,
        "$argon2id$x",
        "secret",
        "two words",
        "a" * 1001,
        "postgresql://x",
    ),
    *("bot@a.example", "@", "bot@", "a b@c.example", ".bot@a.example", "büro@a.example"),
    *(
        "30/m",
        "0/s",
        "5/d",
        "30/M",
        "1/s ",
        "x" * 64,
        "x" * 65,
        "9lives",
        "a-b_c.d",
        DIGEST,
        "none",
    ),
    *(
        "https://a.example/token",
        "http://a.example",
        "https://",
        "https://a b/",
        "https://[::1]:8/x#y",
    ),
    *(
        [["a.example"]],
        [["a.example", "b.example"], "c.example"],
        [[["a.example"]]],
        [["a.example", []]],
    ),
    *({"host": "a.example"}, {"host": ["a.example"]}, {"hosts": "a.example", "host": "a.example"}),
    *({"host": "a.example", "username": "u"}, {"host": "a.example", "auth": {}, "username": "u"}),
    *({"next_hop": "x"}, {"grant": "refresh_token"}, {"grant": "password"}),
]


def check_takes(text: str) -> bool:
    """Whether `relay check` takes a file, key by key: what is wrong together is beyond a schema."""
    mistakes: list[Any] = []
    tree = Composer("relay.yaml", mistakes).compose(text)
    assert tree is not None, text
    conformer = Conformer(mistakes)
    config = build(conformer.conform(tree, section_of(Config), ""), conformer)
    return config is not None and not mistakes


def changed(key: str, value: Any) -> dict[str, Any]:
    """The section of the base that has a key, with a value there; "*" is the first of a list or of
    a map.
    """
    section = key.partition(".")[0]
    document = {name: copy.deepcopy(of) for name, of in BASE.items() if name == section}
    at: Any = document
    *steps, last = key.split(".")
    for step in steps:
        if step == "*":
            at = at[0] if isinstance(at, list) else next(iter(at.values()))
        else:
            at = at.setdefault(step, [] if (steps[-1:], last) == ([step], "*") else {})
    if last == "*" and isinstance(at, list):
        at[:] = [value]
    else:
        at[next(iter(at)) if last == "*" else last] = value
    return document


def places(shape: Shape, key: str = "") -> list[str]:
    """Every key, and every place in a list or a map."""
    found = []
    for name, below in known_keys(shape, key):
        found.append(name)
        if type(below).__name__ in ("Items", "Names") or "inner=Items" in repr(below)[:40]:
            found.append(f"{name}.*")
    return found


def written(document: Any) -> str:
    """A file with these values. JSON is YAML, and is written a hundred times as fast."""
    return json.dumps(document, ensure_ascii=False)


def disagreements(documents: list[tuple[str, Any]]) -> list[str]:
    return [
        f"{key}: {document!r:.200}"
        for key, document in documents
        if VALIDATOR.is_valid(document) != check_takes(written(document))
    ]


_IN_PLACE = ("routes.*.", "routes_by_sender.*.")
PLACES = [key for key in places(section_of(Config)) if not key.startswith(_IN_PLACE)]
"""The keys of a next hop are the same in a route and under `next_hops`: once is enough."""


def test_there_is_a_place_for_every_key() -> None:
    assert {"access.users.*.sender_domains.*", "routes.*", "listeners.*.address"} <= set(PLACES)
    assert check_takes(written(BASE))


@pytest.mark.parametrize("key", PLACES)
def test_schema_and_check_agree_on_each_value_of_each_key(key: str) -> None:
    assert disagreements([(key, changed(key, value)) for value in VALUES]) == []


@pytest.mark.parametrize(
    "key",
    [
        "policy.domains",
        "policy.destinations",
        "routes",
        "routes_by_sender",
        "next_hops",
        "oauth2",
        "dkim.domains",
        "access.users",
        "admin.web.users",
    ],
)
def test_schema_and_check_agree_on_names(key: str) -> None:
    [value] = _at(BASE, key).values()
    names = [text for text in VALUES if isinstance(text, str)]
    assert disagreements([(key, changed(key, {name: value})) for name in names]) == []


def _at(document: Any, key: str) -> Any:
    for step in key.split("."):
        document = document[step]
    return document


@pytest.mark.parametrize("word", ["yes", "No", "TRUE", "off"])
def test_the_schema_takes_truths_as_yaml_1_2_reads_them(word: str) -> None:
    assert check_takes(f"policy: {{default: {{require_tls: {word}}}}}")
    read = True if word == "TRUE" else word
    assert VALIDATOR.is_valid({"policy": {"default": {"require_tls": read}}})


@given(st.from_regex(r"([0-9]{0,9}(ms|[wdhms])){0,3}", fullmatch=True))
def test_schema_and_check_agree_on_durations(text: str) -> None:
    assert disagreements([("limits.idle", {"limits": {"idle": text}})]) == []


@given(st.from_regex(r"-?[0-9]{0,17}(B|KiB|MiB|GiB|TiB|MB)?", fullmatch=True))
def test_schema_and_check_agree_on_sizes(text: str) -> None:
    assert disagreements([("x", {"limits": {"message_size": text}})]) == []


@given(st.integers(-(10**20), 10**20), st.sampled_from(["workers", "port", "recipients"]))
def test_schema_and_check_agree_on_numbers(number: int, name: str) -> None:
    sections = {"port": {"delivery": {"port": number}}, "recipients": {"limits": {name: number}}}
    assert disagreements([(name, sections.get(name, {name: number}))]) == []


@given(
    st.ip_addresses(),
    st.integers(0, 130),
    st.sampled_from(["{}", "{}/{}", "[{}]", "{}:{}", "[{}]:{}"]),
)
def test_schema_and_check_agree_on_addresses(address: Any, number: int, form: str) -> None:
    """Of a network the schema does not know whether bits stand behind the prefix."""
    text = form.format(address, number)
    documents: list[tuple[str, Any]] = [
        ("nameserver", {"resolver": {"nameservers": [text]}}),
        ("listener", {"listeners": [{"address": text}]}),
        ("host", {"routes": {"a.example": {"host": text}}}),
    ]
    assert disagreements(documents) == []


_PART: dict[str, list[Any]] = {
    "host": ["a.example", "[192.0.2.1]", "a b", None],
    "hosts": ["a.example", ["a.example"], [["a.example", "b.example"], "c.example"], [], [[]]],
    "port": [587, 0, "587"],
    "tls": ["implicit", "none"],
    "username": ["u", None, 7],
    "password_file": ["/f", None, ""],
    "auth": [None, {}, {"mechanism": "xoauth2", "oauth2": "t"}, {"mechanism": "x"}, {"user": "u"}],
    "rate": ["30/m", "30", None],
    "pin_sha256": [DIGEST, [DIGEST], [], None, "x"],
    "next_hop": ["provider", "two words", None],
    "unknown": [1],
}


@given(
    st.fixed_dictionaries({}, optional={key: st.sampled_from(of) for key, of in _PART.items()}),
    st.sampled_from(["routes", "routes_by_sender", "next_hops"]),
)
def test_schema_and_check_agree_on_next_hops(hop: dict[str, Any], section: str) -> None:
    assert disagreements([(section, {section: {"name": hop}})]) == []


@given(st.from_regex(r"-?[0-9]{0,11}/?(s|m|h|d|min)?", fullmatch=True))
def test_schema_and_check_agree_on_rates(text: str) -> None:
    document = {"next_hops": {"a": {"host": "a.example", "rate": text}}}
    assert disagreements([("rate", document)]) == []


@given(st.from_regex(r"[a-zA-Z.+ü @*-]{0,12}@?[a-z.*\[\]0-9-]{0,12}", fullmatch=True))
def test_schema_and_check_agree_on_senders(text: str) -> None:
    assert disagreements([("sender", {"routes_by_sender": {text: "a"}})]) == []


def test_each_form_has_its_words_and_an_example_that_it_takes() -> None:
    assert set(WORDS) == set(TextForm)
    for form, word in WORDS.items():
        assert re.fullmatch(word.pattern, word.example), form
        assert word.read(word.example), form


def test_schema_has_no_text_for_programmers() -> None:
    assert "description" not in str(SCHEMA)


# --- the reference --------------------------------------------------------------------------------


def test_the_comments_of_the_reference_name_each_choice() -> None:
    """`tls: none   # none | starttls | …`. The TLS versions are named once, at `min_tls`."""
    lines = (ROOT / "conf/relay.yaml").read_text().splitlines()
    for key, shape in known_keys(section_of(Config)):
        name = key.rpartition(".")[2]
        if not isinstance(shape, Choice) or name.endswith("min_version"):
            continue
        comments = [line.partition(f"{name}: ")[2].partition("#")[2] for line in lines]
        assert any(
            set(re.findall(r"[\w.-]+", comment)) >= set(shape.words) for comment in comments
        ), f"{key}: the reference does not say {' | '.join(shape.words)}"


def test_reference_and_fields_agree_on_what_sighup_takes_over() -> None:
    text = " ".join((ROOT / "conf/relay.yaml").read_text().replace("#", " ").split())
    [said] = re.findall(r"What changes then: certificates, (.*?)\. Every", text)
    section = section_of(Config)
    whole = {name for name, key in section.keys.items() if key.is_reloaded}
    parts = {
        f"{name}.{inner}"
        for name, key in section.keys.items()
        if isinstance(key.shape, Section)
        for inner, below in key.shape.keys.items()
        if below.is_reloaded
    }
    assert set(said.split(", ")) == whole | parts
