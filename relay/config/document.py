"""The configuration in effect, as the file would say it with every key written out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from relay.config.conform import SIZES, shape_of
from relay.config.sections import Config
from relay.config.tree import dotted
from relay.config.words import format_duration, format_size


def as_document(config: Config, *, with_secrets: bool = False) -> dict[str, Any]:
    """The configuration as the file would say it, every key written out; secrets masked unless wanted."""
    document: dict[str, Any] = _plain(config, "", with_secrets)
    return document


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
        for name in ("policy", "routes", "resolver", "tls", "delivery")
    }


_SECRETS = re.compile(
    r"access\.users\..+\.password|admin\.api_keys\.\d+|admin\.webhook_signing_key|queue\.url"
)
MASKED = "********"


def _plain(value: Any, key: str, with_secrets: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shape = shape_of(type(value)).items()
        return {
            name: _plain(getattr(value, f), dotted(key, name), with_secrets)
            for name, (f, _) in shape
        }
    if isinstance(value, Mapping):
        return {
            str(name): _plain(below, dotted(key, str(name)), with_secrets)
            for name, below in value.items()
        }
    if isinstance(value, (tuple, list, frozenset)):
        items = sorted(value, key=str) if isinstance(value, frozenset) else value
        return [_plain(item, dotted(key, str(i)), with_secrets) for i, item in enumerate(items)]
    if value is not None and not with_secrets and _SECRETS.fullmatch(key):
        return MASKED
    if value is None and key == "queue.warn_after":
        return "never"
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, int) and key in SIZES:
        return format_size(value)
    return value if value is None or isinstance(value, (bool, int)) else str(value)
