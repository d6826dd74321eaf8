"""The configuration in effect, as the file would say it with every key written out.

An empty list is left out where a file may not have one: without its key it is the default.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from relay.config.quantities import format_duration, format_rate, format_size
from relay.config.sections import Config
from relay.config.shape import (
    Choice,
    Duration,
    Items,
    Maybe,
    NameOr,
    Names,
    Section,
    Shape,
    Text,
    section_of,
)
from relay.mail.jsontext import JsonDocument
from relay.mail.option import TextForm
from relay.route.next_hop import NextHop


def as_document(config: Config, *, with_secrets: bool = False) -> JsonDocument:
    """The configuration as the file would say it, every key written out; secrets masked unless
    wanted.
    """
    document: JsonDocument = _plain(config, section_of(Config), with_secrets)
    return document


def next_hop_as_document(hop: NextHop) -> JsonDocument:
    """A next hop as the file would say it, without the keys that have their default."""
    section = section_of(NextHop)
    document: JsonDocument = _plain(hop, section, with_secrets=False)
    default = _plain(NextHop(hop.name, ()), section, with_secrets=False)
    given = {key: value for key, value in document.items() if value != default.get(key)}
    if hop.auth is not None:
        given["auth"] = {key: value for key, value in given["auth"].items() if value is not None}
    return given


def fingerprints(config: Config) -> dict[str, str]:
    """What decides where a message goes and how, digested section by section, to be compared.

    How many deliveries there are at a time is left out: each of several workers has a part of it.
    """
    document = as_document(config)
    delivery = {
        key: value for key, value in document["delivery"].items() if "concurrency" not in key
    }
    sections = {**document, "delivery": delivery}
    return {
        name: hashlib.sha256(json.dumps(sections[name], sort_keys=True).encode()).hexdigest()
        for name in _DECIDES
    }


_DECIDES = (
    "policy",
    "routes",
    "routes_by_sender",
    "next_hops",
    "oauth2",
    "resolver",
    "tls",
    "delivery",
)

MASKED = "********"


def _is_left_out(value: Any, shape: Shape) -> bool:
    return isinstance(shape, Items) and shape.not_empty is not None and not value


def _plain(value: Any, shape: Shape, with_secrets: bool) -> Any:
    match shape:
        case Section():
            return {
                name: _plain(getattr(value, key.field), key.shape, with_secrets)
                for name, key in shape.keys.items()
                if not _is_left_out(getattr(value, key.field), key.shape)
            }
        case Names():
            return {name: _plain(below, shape.value, with_secrets) for name, below in value.items()}
        case NameOr(name, section, _):
            return _plain(value, name if isinstance(value, str) else section, with_secrets)
        case Items():
            items = [_plain(item, shape.item, with_secrets) for item in value]
            return items[0] if shape.or_one and len(items) == 1 else items
        case Maybe(inner):
            if value is None:
                return "never" if isinstance(inner, Duration) else None
            return _plain(value, inner, with_secrets)
        case Duration():
            return format_duration(value)
        case Text(form=TextForm.SIZE):
            return format_size(value)
        case Text(form=TextForm.RATE):
            return format_rate(value)
        case Text():
            return MASKED if shape.is_secret and not with_secrets else str(value)
        case Choice():
            return str(value)
        case _:
            return value
