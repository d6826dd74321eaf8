"""What a context trusts, speaks and looks at."""

from __future__ import annotations

import ssl
import warnings

import pytest

from relay.deliver.tls import TlsContexts, server_name
from relay.route.next_hop import Host
from relay.route.security import SecurityOptions, TlsVersion, requirement
from tests.fakes.mail import settings

OPTIONS = SecurityOptions()
HOST = Host("mx.example", "192.0.2.1", 25)


def context(
    require: bool, skip: bool, options: SecurityOptions = OPTIONS, ca_file: str | None = None
):
    needed = requirement(settings(require, skip), options)
    return TlsContexts(ca_file).handshake(HOST, needed).context


@pytest.mark.parametrize("require", [False, True])
def test_verifying_context_checks_chain_dates_and_name(require):
    made = context(require, skip=False)
    assert made.verify_mode is ssl.CERT_REQUIRED
    assert made.check_hostname
    assert not made.hostname_checks_common_name
    assert made.minimum_version is ssl.TLSVersion.TLSv1_2


def test_the_flags_do_not_change_with_the_python_that_runs_us():
    assert context(False, False).verify_flags == ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST


@pytest.mark.parametrize("require", [False, True])
def test_context_that_does_not_verify_accepts_any_certificate(require):
    made = context(require, skip=True)
    assert made.verify_mode is ssl.CERT_NONE
    assert not made.check_hostname


def test_old_tls_is_allowed_only_where_clear_text_is_the_alternative():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert context(False, True).minimum_version is ssl.TLSVersion.TLSv1
    assert context(True, True).minimum_version is ssl.TLSVersion.TLSv1_2
    strict = SecurityOptions(min_version=TlsVersion.TLS_1_3)
    assert context(True, False, strict).minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    ("require", "skip"), [(a, b) for a in (False, True) for b in (False, True)]
)
def test_no_cipher_leaves_the_host_unnamed_or_the_content_readable(require, skip):
    for cipher in context(require, skip).get_ciphers():
        assert cipher["strength_bits"] >= 112
        assert cipher["auth"] not in ("auth-null", "auth-psk", "auth-srp")


def test_the_roots_of_a_file_are_in_addition_to_those_of_the_system(ca_file, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        ssl.SSLContext, "load_default_certs", lambda self, purpose: loaded.append(purpose)
    )
    before = context(False, False).cert_store_stats()["x509_ca"]
    after = context(False, False, ca_file=ca_file).cert_store_stats()["x509_ca"]
    assert (after - before, loaded) == (1, [ssl.Purpose.SERVER_AUTH] * 2)


def test_contexts_are_built_once_for_the_same_needs():
    contexts = TlsContexts()
    needs = [requirement(settings(r, s), OPTIONS) for r in (False, True) for s in (False, True)]
    made = [contexts.handshake(HOST, needed).context for needed in needs]
    assert made == [contexts.handshake(HOST, needed).context for needed in needs]
    assert made[0] is made[2]
    assert len(set(made)) == 3


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("mx.example", "mx.example"),
        ("MX.Example.", "mx.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("192.0.2.1", None),
        ("[2001:db8::1]", None),
        ("2001:db8::1", None),
        ("", None),
    ],
)
def test_server_name_is_the_name_of_the_host_without_a_final_dot(name, sent):
    assert server_name(name) == sent
