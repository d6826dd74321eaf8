"""Where the two settings of a message come from: the operator's rules and the message's own wishes.

Each setting is resolved separately. The first of these that gives a value decides:

    1. the message           its header fields, or the options of the HTTP interface
    2. the recipient domain  `destinations`: the exact name, then "*." patterns, longest first
    3. the sender domain     what was set over HTTP for exactly this domain (`with_overlay`), then
                             `domains`, found the same way; none for the null reverse-path
    4. `default`             false for a setting that it does not name

`allow_override: false` on any rule that applies locks both settings against the message, also a
setting that the rule does not name. The message may still make a setting stricter (require false
to true, skip true to false). A wish for less protection has no effect; it only changes the source
to `message-refused`. A setting made over HTTP is limited in the same way, without a note in the
source. A lock has no effect between the operator's own rules: their precedence decides.

The resolved settings are stored with the message. `tighten` and `reconsider` can make them
stricter and never weaker: after a reload, or in a DSN, by the message that it reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple, TypeVar

from relay.mail.address import AddressError, domain_of, normalise_domain
from relay.mail.option import NotEmpty, TextForm
from relay.policy.fields import NO_WISHES, Wishes
from relay.policy.settings import FloorUse, MemoryAction, Setting, Source, TlsSettings

Rule = TypeVar("Rule", bound="TlsRule")

_STRICT_REQUIRE = True
_STRICT_SKIP = False


@dataclass(frozen=True, slots=True)
class TlsRule:
    """One rule of the operator. None: the rule does not name that setting."""

    require_tls: bool | None = None
    skip_verification: bool | None = None
    allow_override: bool = True


@dataclass(frozen=True, slots=True)
class DestinationRule(TlsRule):
    """A rule for a recipient domain.

    `mta_sts`, `dane`: how the relay uses what the domain publishes; `downgrade_memory`: how it uses
    what the domain's hosts have shown before. `mx`: the only mail hosts that the relay may connect
    to, names or "*." patterns; empty: any host.
    """

    mta_sts: FloorUse | None = None
    dane: FloorUse | None = None
    downgrade_memory: MemoryAction | None = None
    mx: Annotated[
        tuple[Annotated[str, TextForm.PIN], ...],
        NotEmpty("no host is named", "name one, or remove the key"),
    ] = ()


_MOST_KNOWN = 10_000
"""Settings that are kept for the next message; all are forgotten where there would be more."""


@dataclass(frozen=True, slots=True)
class PolicyRules:
    """All rules of the operator.

    A key is a domain, or a pattern "*.example.com", which covers sub-domains and not the domain
    itself. Keys are normalised (`normalise_domain`). A key that is no domain is a ValueError; so
    are two spellings of the same domain.
    """

    default: TlsRule = TlsRule(require_tls=False, skip_verification=False)
    domains: Mapping[Annotated[str, TextForm.DOMAIN_PATTERN], TlsRule] = field(default_factory=dict)
    destinations: Mapping[Annotated[str, TextForm.DOMAIN_PATTERN], DestinationRule] = field(
        default_factory=dict
    )
    mta_sts: FloorUse = FloorUse.ENFORCE
    dane: FloorUse = FloorUse.ENFORCE
    overlay: Mapping[str, TlsRule] = field(default_factory=dict, init=False)
    """The settings made over HTTP, by sender domain; no rule of the file."""
    _known: dict[tuple[str, str, bool | None, bool | None], TlsSettings] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The settings resolved so far, by sender domain, recipient domain and wishes."""
    _reconsidered: dict[tuple[TlsSettings, str, str], TlsSettings] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The settings reconsidered so far: those stored, sender domain and recipient domain."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", _normalise_keys(self.domains))
        object.__setattr__(self, "destinations", _normalise_keys(self.destinations))


@dataclass(frozen=True, slots=True)
class FloorRules:
    """How the relay uses what a recipient domain publishes.

    `pins`: the hosts that the operator allows, None for any host. `is_waived`: a rule for the
    domain turns a look-up off. `memory`: how the relay uses what its hosts have shown before, None
    where no rule speaks.
    """

    mta_sts: FloorUse = FloorUse.ENFORCE
    dane: FloorUse = FloorUse.ENFORCE
    pins: tuple[str, ...] | None = None
    is_waived: bool = False
    memory: MemoryAction | None = None


class _Applying(NamedTuple):
    """A rule that applies to a message, with its place and its key in the configuration."""

    source: Source
    key: str
    rule: TlsRule


def resolve(
    rules: PolicyRules, *, reverse_path: str, recipient_domain: str, wishes: Wishes = NO_WISHES
) -> TlsSettings:
    """The settings of a message for one recipient domain (normalised)."""
    return _resolved(rules, _sender_domain(reverse_path), recipient_domain, wishes)


def effective(rules: PolicyRules, domain: str) -> TlsSettings:
    """The settings of mail from a sender domain (normalised).

    They do not yet consider the recipient domain and the wishes of a message.
    """
    return _resolved(rules, domain, "", NO_WISHES)


def floor_rules(rules: PolicyRules, recipient_domain: str) -> FloorRules:
    """How the relay uses what a recipient domain (normalised) publishes.

    The nearest rule for the domain that names it decides, or else the value for all domains.
    """
    if not rules.destinations:
        return FloorRules(rules.mta_sts, rules.dane)
    found = [rules.destinations[key] for key in _keys_for(rules.destinations, recipient_domain)]
    mta_sts = next((rule.mta_sts for rule in found if rule.mta_sts is not None), None)
    dane = next((rule.dane for rule in found if rule.dane is not None), None)
    said = (rule.downgrade_memory for rule in found if rule.downgrade_memory is not None)
    return FloorRules(
        mta_sts or rules.mta_sts,
        dane or rules.dane,
        next((rule.mx for rule in found if rule.mx), None),
        FloorUse.IGNORE in (mta_sts, dane),
        next(said, None),
    )


def is_locked(rules: PolicyRules, reverse_path: str, recipient_domain: str) -> bool:
    """Whether a rule that applies has `allow_override: false`."""
    applying = _applying(rules, _sender_domain(reverse_path), recipient_domain)
    return not all(applied.rule.allow_override for applied in applying)


def with_overlay(rules: PolicyRules, settings: Mapping[str, TlsRule]) -> PolicyRules:
    """The rules with the settings made over HTTP, by sender domain (normalised).

    Such a setting comes before the rule of the sender domain.
    """
    overlaid = replace(rules)
    object.__setattr__(overlaid, "overlay", dict(settings))
    return overlaid


def _resolved(
    rules: PolicyRules, sender_domain: str, recipient_domain: str, wishes: Wishes
) -> TlsSettings:
    key = sender_domain, recipient_domain, wishes.require_tls, wishes.skip_verification
    settings = rules._known.get(key)
    if settings is None:
        if len(rules._known) >= _MOST_KNOWN:
            rules._known.clear()
        settings = rules._known[key] = _resolve(rules, sender_domain, recipient_domain, wishes)
    return settings


def _resolve(
    rules: PolicyRules, sender_domain: str, recipient_domain: str, wishes: Wishes
) -> TlsSettings:
    applying = list(_applying(rules, sender_domain, recipient_domain))
    locked = not all(applied.rule.allow_override for applied in applying)
    set_by_api = rules.overlay.get(sender_domain) if rules.overlay and sender_domain else None
    if set_by_api is not None:
        applying = list(
            _laid_over(applying, _Applying(Source.API, sender_domain, set_by_api), locked)
        )
    require_tls = _first_spoken((a.source, a.key, a.rule.require_tls) for a in applying)
    skip_verification = _first_spoken((a.source, a.key, a.rule.skip_verification) for a in applying)
    return TlsSettings(
        _overridden(require_tls, wishes.require_tls, _STRICT_REQUIRE, locked),
        _overridden(skip_verification, wishes.skip_verification, _STRICT_SKIP, locked),
    )


def _laid_over(applying: list[_Applying], overlay: _Applying, locked: bool) -> Iterator[_Applying]:
    """The rules with the overlay after the destinations and before the sender domain's rules.

    Under a lock the overlay keeps only the values that are stricter than those of the later rules.
    """
    before = [a for a in applying if a.source is Source.DESTINATION]
    behind = applying[len(before) :]
    rule = overlay.rule
    if locked:
        require_tls = _first_spoken((a.source, a.key, a.rule.require_tls) for a in behind).value
        skip_verification = _first_spoken(
            (a.source, a.key, a.rule.skip_verification) for a in behind
        ).value
        rule = TlsRule(
            require_tls=True if rule.require_tls and not require_tls else None,
            skip_verification=False
            if rule.skip_verification is False and skip_verification
            else None,
        )
    yield from before
    yield overlay._replace(rule=rule)
    yield from behind


def resolve_dsn(rules: PolicyRules, *, recipient_domain: str, about: TlsSettings) -> TlsSettings:
    """The settings of a DSN to `recipient_domain`.

    They are those of the null reverse-path, and never weaker than those of the message that the DSN
    reports and quotes.
    """
    return tighten(resolve(rules, reverse_path="", recipient_domain=recipient_domain), about)


def tighten(stored: TlsSettings, current: TlsSettings) -> TlsSettings:
    """`stored`, with each setting (and its source) of `current` that is stricter; `stored` itself
    where none is.
    """
    require_tls = _stricter(stored.require_tls, current.require_tls, _STRICT_REQUIRE)
    skip_verification = _stricter(stored.skip_verification, current.skip_verification, _STRICT_SKIP)
    if require_tls is stored.require_tls and skip_verification is stored.skip_verification:
        return stored
    return TlsSettings(require_tls, skip_verification)


def reconsider(
    stored: TlsSettings, rules: PolicyRules, *, reverse_path: str, recipient_domain: str
) -> TlsSettings:
    """The settings of a queued message under the current rules, after a reload.

    The sources stored with the message tell what the message asked for.
    """
    known = rules._reconsidered
    key = stored, _sender_domain(reverse_path), recipient_domain
    settings = known.get(key)
    if settings is None:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        settings = known[key] = _reconsider(stored, rules, *key[1:])
    return settings


def _reconsider(
    stored: TlsSettings, rules: PolicyRules, sender_domain: str, recipient_domain: str
) -> TlsSettings:
    wishes = Wishes(
        require_tls=_wish_behind(stored.require_tls),
        skip_verification=_wish_behind(stored.skip_verification),
    )
    return tighten(stored, _resolved(rules, sender_domain, recipient_domain, wishes))


def _sender_domain(reverse_path: str) -> str:
    """The domain whose rules apply; "" for the null reverse-path and for `<postmaster>`."""
    try:
        return domain_of(reverse_path)
    except AddressError:
        return ""


def _applying(rules: PolicyRules, sender_domain: str, recipient_domain: str) -> Iterator[_Applying]:
    """Every rule that applies, in the order of precedence."""
    for key in _keys_for(rules.destinations, recipient_domain):
        yield _Applying(Source.DESTINATION, key, rules.destinations[key])
    for key in _keys_for(rules.domains, sender_domain):
        yield _Applying(Source.DOMAIN, key, rules.domains[key])
    yield _Applying(Source.DEFAULT, "default", rules.default)


def _keys_for(table: Mapping[str, TlsRule], domain: str) -> Iterator[str]:
    """The keys that cover a domain: its name, then patterns from the longest to the shortest."""
    if not table or not domain:
        return
    if domain in table:
        yield domain
    dot = domain.find(".")
    while dot >= 0:
        pattern = f"*{domain[dot:]}"
        if pattern in table:
            yield pattern
        dot = domain.find(".", dot + 1)


def _first_spoken(answers: Iterable[tuple[Source, str, bool | None]]) -> Setting:
    for source, key, value in answers:
        if value is not None:
            return Setting(value, source, key)
    return Setting(False, Source.DEFAULT, "default")


def _overridden(ruled: Setting, wish: bool | None, strict: bool, locked: bool) -> Setting:
    """The operator's setting after the message's wish; `strict` is the value that protects more."""
    if wish is None:
        return ruled
    if locked and wish != ruled.value and wish != strict:
        return Setting(ruled.value, Source.MESSAGE_REFUSED, ruled.rule)
    return Setting(wish, Source.MESSAGE)


def _stricter(stored: Setting, current: Setting, strict: bool) -> Setting:
    return current if current.value == strict != stored.value else stored


def _wish_behind(setting: Setting) -> bool | None:
    """What the message asked for, as its stored setting shows."""
    match setting.source:
        case Source.MESSAGE:
            return setting.value
        case Source.MESSAGE_REFUSED:
            return not setting.value
        case _:
            return None


def _normalise_keys(table: Mapping[str, Rule]) -> Mapping[str, Rule]:
    normalised: dict[str, Rule] = {}
    for key, rule in table.items():
        name = f"*.{normalise_domain(key[2:])}" if key.startswith("*.") else normalise_domain(key)
        if name in normalised:
            raise ValueError(f"{key!r} is a second spelling of {name!r}")
        normalised[name] = rule
    return normalised
