"""The configuration of signatures: which domains are signed for, with which keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from relay.mail.option import Path, TextForm


@dataclass(frozen=True, slots=True)
class DkimDomain:
    """How mail of a domain is signed. `selector`: the key's name in the DNS. `key_file`: PEM."""

    selector: Annotated[str, TextForm.SELECTOR]
    key_file: Path


@dataclass(frozen=True, slots=True)
class DkimOptions:
    """The domains whose mail is signed. `relay dkim-key` makes a key and its DNS record."""

    domains: Mapping[Annotated[str, TextForm.DOMAIN], DkimDomain] = field(default_factory=dict)
