"""Which rule a message is sent under, and who may change it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.policy import rules as policy_rules
from relay.policy.fields import NO_WISHES, Wishes
from relay.policy.rules import (
    DestinationRule,
    FloorRules,
    PolicyRules,
    TlsRule,
    effective,
    floor_rules,
    is_locked,
    reconsider,
    resolve,
    resolve_dsn,
    tighten,
    with_overlay,
)
from relay.policy.settings import FloorUse, MemoryAction, Setting, Source, TlsSettings

RULES = PolicyRules(
    default=TlsRule(False, False),
    domains={
        "example.com": TlsRule(require_tls=True),
        "*.example.com": TlsRule(skip_verification=True),
        "*.deep.example.com": TlsRule(require_tls=True, skip_verification=False),
        "old.example": TlsRule(skip_verification=True, allow_override=False),
        "strict.example": TlsRule(require_tls=True, skip_verification=False, allow_override=False),
        "Bücher.Example.": TlsRule(require_tls=True),
    },
    destinations={
        "partner.example": DestinationRule(require_tls=True, allow_override=False),
        "*.partner.example": DestinationRule(skip_verification=True),
        "open.example": DestinationRule(require_tls=False, skip_verification=True),
    },
)


def settings(
    sender: str, recipient_domain: str = "b.example", wishes: Wishes = NO_WISHES
) -> TlsSettings:
    return resolve(RULES, reverse_path=sender, recipient_domain=recipient_domain, wishes=wishes)


def in_words(setting: Setting) -> str:
    return f"{'yes' if setting.value else 'no'} {setting.source} {setting.rule}"


@pytest.mark.parametrize(
    ("sender", "recipient_domain", "require", "skip"),
    [
        ("a@other.example", "b.example", "no default default", "no default default"),
        ("a@example.com", "b.example", "yes domain example.com", "no default default"),
        ("a@EXAMPLE.com", "b.example", "yes domain example.com", "no default default"),
        ("a@x.example.com", "b.example", "no default default", "yes domain *.example.com"),
        (
            "a@x.deep.example.com",
            "b.example",
            "yes domain *.deep.example.com",
            "no domain *.deep.example.com",
        ),
        ("a@deep.example.com", "b.example", "no default default", "yes domain *.example.com"),
        ("a@w.x.y.example.com", "b.example", "no default default", "yes domain *.example.com"),
        ("a@notexample.com", "b.example", "no default default", "no default default"),
        ("a@bücher.example", "b.example", "yes domain xn--bcher-kva.example", "no default default"),
        ("a@XN--bcher-kva.example", "b.example", "yes domain"
                                                 " xn--bcher-kva.example", "no default default"),
        ("a@example.com", "open.example", "no destination open.example", "yes destination"
                                                                         " open.example"),
        ("a@old.example", "partner.example", "yes destination"
                                             " partner.example", "yes domain old.example"),
        ("a@other.example", "x.partner.example", "no default default", "yes destination"
                                                                       " *.partner.example"),
        ("", "b.example", "no default default", "no default default"),
        ("", "partner.example", "yes destination partner.example", "no default default"),
        ("postmaster", "b.example", "no default default", "no default default"),
    ],
)  # fmt: skip
def test_each_setting_comes_from_the_first_rule_that_names_it(
    sender, recipient_domain, require, skip
):
    found = settings(sender, recipient_domain)
    assert (in_words(found.require_tls), in_words(found.skip_verification)) == (require, skip)


def test_message_comes_before_every_rule():
    found = settings(
        "a@example.com", "open.example", Wishes(require_tls=True, skip_verification=False)
    )
    assert found.require_tls == Setting(True, Source.MESSAGE)
    assert found.skip_verification == Setting(False, Source.MESSAGE)
    weaker = settings("a@example.com", wishes=Wishes(require_tls=False, skip_verification=True))
    assert weaker.require_tls == Setting(False, Source.MESSAGE)
    assert weaker.skip_verification == Setting(True, Source.MESSAGE)


OVERLAY = {
    "example.com": TlsRule(require_tls=False, skip_verification=True),
    "new.example": TlsRule(require_tls=True),
    "old.example": TlsRule(require_tls=True, skip_verification=False),
    "strict.example": TlsRule(require_tls=False, skip_verification=True),
    "a.example.com": TlsRule(require_tls=True),
}


REFUSED = ("yes message-refused", "no message-refused")


@pytest.mark.parametrize(
    ("sender", "recipient_domain", "wishes", "require", "skip"),
    [
        # It stands above the file's rule of the same domain, and is exact: sub-domains have none of
        # it.
        ("a@Example.COM", "b.example", NO_WISHES, "no api example.com", "yes api example.com"),
        ("a@new.example", "b.example", NO_WISHES, "yes api new.example", "no default default"),
        (
            "a@b.example.com",
            "b.example",
            NO_WISHES,
            "no default default",
            "yes domain *.example.com",
        ),
        (
            "a@a.example.com",
            "b.example",
            NO_WISHES,
            "yes api a.example.com",
            "yes domain *.example.com",
        ),
        ("", "b.example", NO_WISHES, "no default default", "no default default"),
        # Below the recipient's domain and the message.
        (
            "a@example.com",
            "sub.partner.example",
            NO_WISHES,
            "no api example.com",
            "yes destination *.partner.example",
        ),
        ("a@example.com", "b.example", Wishes(True, False), "yes message ", "no message "),
        # A lock lets it make things stricter only.
        ("a@old.example", "b.example", NO_WISHES, "yes api old.example", "no api old.example"),
        (
            "a@strict.example",
            "b.example",
            NO_WISHES,
            "yes domain strict.example",
            "no domain strict.example",
        ),
        (
            "a@old.example",
            "b.example",
            Wishes(False, True),
            "yes message-refused old.example",
            "no message-refused old.example",
        ),
        # A lock of the recipient's counts too.
        (
            "a@example.com",
            "partner.example",
            NO_WISHES,
            "yes destination partner.example",
            "no default default",
        ),
    ],
)
def test_setting_made_over_http_comes_before_the_rule_of_its_domain(
    sender, recipient_domain, wishes, require, skip
):
    rules = with_overlay(RULES, OVERLAY)
    found = resolve(rules, reverse_path=sender, recipient_domain=recipient_domain, wishes=wishes)
    assert (in_words(found.require_tls), in_words(found.skip_verification)) == (require, skip)


@pytest.mark.parametrize(
    ("ruled", "over_http", "require", "skip"),
    [
        # Nothing said over HTTP, or the same, or less: the locked rule stands, and is named.
        (TlsRule(False, True, False), TlsRule(), "no domain", "yes domain"),
        (TlsRule(False, True, False), TlsRule(False, True), "no domain", "yes domain"),
        (TlsRule(True, False, False), TlsRule(True, False), "yes domain", "no domain"),
        (TlsRule(True, False, False), TlsRule(False, True), "yes domain", "no domain"),
        # More: it is had.
        (TlsRule(False, True, False), TlsRule(True, False), "yes api", "no api"),
    ],
)
def test_over_http_a_locked_rule_can_be_made_stricter_and_nothing_else(
    ruled, over_http, require, skip
):
    rules = with_overlay(PolicyRules(domains={"a.example": ruled}), {"a.example": over_http})
    found = resolve(rules, reverse_path="a@a.example", recipient_domain="b.example")
    words = [
        f"{'yes' if s.value else 'no'} {s.source}"
        for s in (found.require_tls, found.skip_verification)
    ]
    assert words == [require, skip]


def test_file_cannot_contain_a_setting_made_over_http():
    with pytest.raises(TypeError):
        PolicyRules(overlay={})  # type: ignore[call-arg]


def test_the_effective_settings_of_a_domain_are_those_of_its_mail():
    rules = with_overlay(RULES, OVERLAY)
    assert effective(rules, "new.example").require_tls == Setting(True, Source.API, "new.example")
    assert effective(RULES, "new.example").require_tls == Setting(False, Source.DEFAULT, "default")


def test_taking_the_setting_of_a_domain_back_never_loosens_mail_that_was_accepted_under_it():
    under_it = with_overlay(RULES, {"new.example": TlsRule(require_tls=True)})
    accepted = resolve(under_it, reverse_path="a@new.example", recipient_domain="b.example")
    after = reconsider(accepted, RULES, reverse_path="a@new.example", recipient_domain="b.example")
    assert after.require_tls == Setting(True, Source.API, "new.example")


@pytest.mark.parametrize(
    ("sender", "recipient_domain", "wishes", "require", "skip"),
    [
        # A lock on the sender domain holds what the rule names …
        ("strict.example", "b.example", Wishes(False, True), *REFUSED),
        # … and what it does not: require stays at the default's false, yet may be raised.
        ("old.example", "b.example", Wishes(True, None), "yes message", "yes domain"),
        ("old.example", "b.example", Wishes(None, False), "no default", "no message"),
        ("old.example", "b.example", Wishes(False, True), "no message", "yes message"),
        # A lock on the destination holds the sender domain's settings too.
        ("example.com", "partner.example", Wishes(False, True), *REFUSED),
        ("old.example", "open.example", Wishes(False, True), "no message", "yes message"),
        # Between the operator's own rules precedence holds, lock or no lock.
        ("strict.example", "open.example", NO_WISHES, "no destination", "yes destination"),
    ],
)  # fmt: skip
def test_a_locked_rule_can_be_made_stricter_and_not_weaker(
    sender, recipient_domain, wishes, require, skip
):
    found = settings(f"a@{sender}", recipient_domain, wishes)
    assert in_words(found.require_tls).startswith(require)
    assert in_words(found.skip_verification).startswith(skip)


def test_a_lock_on_the_default_is_a_lock_everywhere():
    rules = PolicyRules(
        default=TlsRule(True, False, allow_override=False), domains={"a.example": TlsRule(False)}
    )
    found = resolve(
        rules, reverse_path="x@a.example", recipient_domain="b.example", wishes=Wishes(None, True)
    )
    assert found.require_tls == Setting(False, Source.DOMAIN, "a.example")
    assert found.skip_verification == Setting(False, Source.MESSAGE_REFUSED, "default")


def test_without_any_rule_both_settings_are_false():
    found = resolve(PolicyRules(), reverse_path="a@a.example", recipient_domain="b.example")
    default = Setting(False, Source.DEFAULT, "default")
    assert found == TlsSettings(default, default)


def test_default_without_a_setting_means_false():
    found = resolve(
        PolicyRules(default=TlsRule()), reverse_path="a@b.example", recipient_domain="c.example"
    )
    assert found == TlsSettings(
        Setting(False, Source.DEFAULT, "default"), Setting(False, Source.DEFAULT, "default")
    )


@pytest.mark.parametrize(
    "key", ["", "*", "*.", "a b", "*.*.example", "example..com", "*example.com"]
)
def test_a_key_that_is_no_domain_is_refused(key):
    with pytest.raises(ValueError, match="domain"):
        PolicyRules(domains={key: TlsRule()})


def test_two_spellings_of_one_domain_are_refused():
    with pytest.raises(ValueError, match="second spelling"):
        PolicyRules(
            destinations={
                "bücher.example": DestinationRule(),
                "XN--BCHER-KVA.example.": DestinationRule(),
            }
        )


def test_a_dsn_is_sent_under_the_default_and_never_more_weakly_than_its_message():
    about = settings("a@example.com", wishes=Wishes(require_tls=True))
    dsn = resolve_dsn(RULES, recipient_domain="example.com", about=about)
    assert dsn == about
    about = settings("a@example.com", wishes=Wishes(False, True))
    assert resolve_dsn(RULES, recipient_domain="example.com", about=about) == settings(
        "", "example.com"
    )
    assert resolve_dsn(RULES, recipient_domain="partner.example", about=about) == settings(
        "", "partner.example"
    )


def test_a_reload_tightens_and_keeps_the_source_of_what_was_tightened():
    stored = TlsSettings(Setting(False, Source.MESSAGE), Setting(True, Source.DOMAIN, "a.example"))
    current = TlsSettings(
        Setting(True, Source.DESTINATION, "b.example"), Setting(False, Source.DEFAULT, "default")
    )
    assert tighten(stored, current) == current
    assert tighten(current, stored) == current
    equal = TlsSettings(Setting(False, Source.DEFAULT), Setting(True, Source.DEFAULT))
    assert tighten(stored, equal) == stored
    strict = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.MESSAGE))
    assert tighten(strict, current) == strict


def test_a_lock_set_while_a_message_waits_holds_for_it_too():
    before = PolicyRules()
    after = PolicyRules(domains={"a.example": TlsRule(True, False, allow_override=False)})
    wishes = Wishes(require_tls=False, skip_verification=True)
    stored = resolve(
        before, reverse_path="x@a.example", recipient_domain="b.example", wishes=wishes
    )
    now = reconsider(stored, after, reverse_path="x@a.example", recipient_domain="b.example")
    assert now.require_tls == Setting(True, Source.MESSAGE_REFUSED, "a.example")
    assert now.skip_verification == Setting(False, Source.MESSAGE_REFUSED, "a.example")
    unlocked = reconsider(now, before, reverse_path="x@a.example", recipient_domain="b.example")
    assert unlocked == now


# --- what holds for all rules, senders and wishes -------------------------------------------------

MAYBE = st.sampled_from([None, False, True])
DOMAINS = st.sampled_from(
    ["a.example", "x.a.example", "y.x.a.example", "b.example", "example", "xa.example"]
)
RULE = st.builds(TlsRule, MAYBE, MAYBE, st.booleans())
TABLE = st.dictionaries(DOMAINS | DOMAINS.map(lambda domain: f"*.{domain}"), RULE, max_size=5)
ALL_RULES = st.builds(PolicyRules, RULE, TABLE, TABLE)
SENDERS = DOMAINS.map(lambda domain: f"s@{domain}") | st.just("")
WISHES = st.builds(Wishes, MAYBE, MAYBE)


def no_weaker(one: TlsSettings, other: TlsSettings) -> bool:
    return (
        one.require_tls.value >= other.require_tls.value
        and one.skip_verification.value <= other.skip_verification.value
    )


def covers(key: str, domain: str) -> bool:
    return domain.endswith(key[1:]) if key.startswith("*.") else key == domain


def has_lock(rules: PolicyRules, sender: str, recipient_domain: str) -> bool:
    senders_domain = sender.rpartition("@")[2]
    tables = ((rules.domains, senders_domain), (rules.destinations, recipient_domain))
    applying = [
        r for table, domain in tables for key, r in table.items() if domain and covers(key, domain)
    ]
    return any(not rule.allow_override for rule in [*applying, rules.default])


@given(ALL_RULES, SENDERS, DOMAINS, WISHES)
def test_a_message_never_weakens_a_locked_rule(rules, sender, recipient_domain, wishes):
    ruled = resolve(rules, reverse_path=sender, recipient_domain=recipient_domain)
    found = resolve(rules, reverse_path=sender, recipient_domain=recipient_domain, wishes=wishes)
    if has_lock(rules, sender, recipient_domain):
        assert no_weaker(found, ruled)
    else:
        assert wishes.require_tls in (None, found.require_tls.value)
        assert wishes.skip_verification in (None, found.skip_verification.value)


@given(ALL_RULES, SENDERS, DOMAINS, WISHES)
def test_a_wish_for_more_is_always_granted(rules, sender, recipient_domain, wishes):
    found = resolve(rules, reverse_path=sender, recipient_domain=recipient_domain, wishes=wishes)
    assert found.require_tls.value or not wishes.require_tls
    assert not found.skip_verification.value or wishes.skip_verification is not False


@given(ALL_RULES, ALL_RULES, SENDERS, DOMAINS, WISHES)
def test_neither_a_reload_nor_a_dsn_is_ever_looser(before, after, sender, recipient_domain, wishes):
    stored = resolve(before, reverse_path=sender, recipient_domain=recipient_domain, wishes=wishes)
    current = resolve(after, reverse_path=sender, recipient_domain=recipient_domain, wishes=wishes)
    reconsidered = reconsider(stored, after, reverse_path=sender, recipient_domain=recipient_domain)
    assert no_weaker(reconsidered, stored)
    assert no_weaker(reconsidered, current)
    assert no_weaker(resolve_dsn(after, recipient_domain=recipient_domain, about=stored), stored)
    assert tighten(stored, stored) == stored


def test_tighten_takes_the_stricter_of_each_setting_in_every_case():
    for a, b, c, d in itertools.product([False, True], repeat=4):
        stored = TlsSettings(Setting(a, Source.MESSAGE), Setting(b, Source.MESSAGE))
        current = TlsSettings(Setting(c, Source.DOMAIN), Setting(d, Source.DOMAIN))
        tightened = tighten(stored, current)
        assert tightened.require_tls.value == (a or c)
        assert tightened.skip_verification.value == (b and d)


@pytest.mark.parametrize(
    ("domain", "use"),
    [
        ("other.example", FloorUse.TESTING),
        ("broken.example", FloorUse.IGNORE),
        ("mail.broken.example", FloorUse.TESTING),
        ("a.below.example", FloorUse.ENFORCE),
        ("silent.below.example", FloorUse.ENFORCE),
    ],
)
def test_rule_of_a_recipient_domain_comes_before_the_value_for_all(
    domain: str, use: FloorUse
) -> None:
    rules = PolicyRules(
        mta_sts=FloorUse.TESTING,
        destinations={
            "broken.example": DestinationRule(mta_sts=FloorUse.IGNORE),
            "*.below.example": DestinationRule(mta_sts=FloorUse.ENFORCE),
            "silent.below.example": DestinationRule(require_tls=True),
        },
    )
    assert floor_rules(rules, domain).mta_sts is use


def test_mta_sts_in_a_rule_changes_neither_setting() -> None:
    rules = PolicyRules(destinations={"a.example": DestinationRule(mta_sts=FloorUse.IGNORE)})
    assert resolve(rules, reverse_path="b@b.example", recipient_domain="a.example") == resolve(
        PolicyRules(), reverse_path="b@b.example", recipient_domain="a.example"
    )


def test_nearest_rule_that_names_it_decides_how_a_published_policy_is_used():
    rules = PolicyRules(
        destinations={
            "*.example": DestinationRule(mta_sts=FloorUse.IGNORE, mx=("mx.far.example",)),
            "a.example": DestinationRule(dane=FloorUse.TESTING),
            "b.example": DestinationRule(mta_sts=FloorUse.ENFORCE, mx=("mx.near.example",)),
        },
        dane=FloorUse.ENFORCE,
        mta_sts=FloorUse.TESTING,
    )
    a = FloorRules(FloorUse.IGNORE, FloorUse.TESTING, ("mx.far.example",), is_waived=True)
    assert floor_rules(rules, "a.example") == a
    b = FloorRules(FloorUse.ENFORCE, FloorUse.ENFORCE, ("mx.near.example",))
    assert floor_rules(rules, "b.example") == b
    assert floor_rules(rules, "c.test") == FloorRules(FloorUse.TESTING, FloorUse.ENFORCE)


def test_nearest_rule_that_names_it_decides_how_the_memory_is_used():
    rules = PolicyRules(
        destinations={
            "*.example": DestinationRule(downgrade_memory=MemoryAction.IGNORE),
            "a.example": DestinationRule(require_tls=True),
            "b.example": DestinationRule(downgrade_memory=MemoryAction.DEFER),
        }
    )
    assert floor_rules(rules, "a.example").memory is MemoryAction.IGNORE
    assert floor_rules(rules, "b.example").memory is MemoryAction.DEFER
    assert floor_rules(rules, "c.test").memory is None
    assert floor_rules(PolicyRules(), "a.example").memory is None
    assert not floor_rules(rules, "a.example").is_waived  # that is about published policies


def test_policy_ignored_for_all_domains_is_not_a_waiver_for_one():
    rules = PolicyRules(mta_sts=FloorUse.IGNORE, dane=FloorUse.IGNORE)
    assert not floor_rules(rules, "a.example").is_waived


@pytest.mark.parametrize(
    ("sender", "domain", "locked"),
    [
        ("a@locked.example", "b.test", True),
        ("a@other.example", "locked.test", True),
        ("a@other.example", "b.test", False),
        ("", "b.test", False),
        ("", "locked.test", True),
    ],
)
def test_a_rule_that_applies_locks_a_message(sender: str, domain: str, locked: bool):
    rules = PolicyRules(
        domains={"locked.example": TlsRule(allow_override=False)},
        destinations={"locked.test": DestinationRule(allow_override=False)},
    )
    assert is_locked(rules, sender, domain) is locked
    every = PolicyRules(default=TlsRule(False, False, False))
    assert is_locked(every, sender, domain)


# --- what is kept for the next message ------------------------------------------------------------


def test_rules_are_the_same_whatever_was_resolved_by_them():
    used, unused = PolicyRules(), PolicyRules()
    resolve(used, reverse_path="a@sender.example", recipient_domain="dest.example")
    assert (used, repr(used)) == (unused, repr(unused))


def test_setting_made_over_http_holds_for_the_next_message():
    rules = PolicyRules()
    resolve(rules, reverse_path="a@sender.example", recipient_domain="dest.example")
    overlaid = with_overlay(rules, {"sender.example": TlsRule(require_tls=True)})
    found = resolve(overlaid, reverse_path="a@sender.example", recipient_domain="dest.example")
    assert found.require_tls.value


def test_settings_kept_for_the_next_message_are_bounded(monkeypatch):
    monkeypatch.setattr(policy_rules, "_MOST_KNOWN", 3)
    rules = PolicyRules(domains={"b.example": TlsRule(require_tls=True)})
    sizes = []
    for sender in ("a", "b", "c", "d", "e", "b"):
        kept = resolve(rules, reverse_path=f"x@{sender}.example", recipient_domain="dest.example")
        assert kept.require_tls.value is (sender == "b")
        sizes.append(len(rules._known))
    assert sizes == [1, 2, 3, 1, 2, 3]


def test_settings_kept_for_one_wish_are_not_those_of_another():
    rules = PolicyRules()
    for wish in (None, True, False, None, True):
        for other in (None, True, False):
            found = resolve(
                rules,
                reverse_path="a@sender.example",
                recipient_domain="dest.example",
                wishes=Wishes(require_tls=wish, skip_verification=other),
            )
            assert (found.require_tls.value, found.skip_verification.value) == (
                bool(wish),
                bool(other),
            )
