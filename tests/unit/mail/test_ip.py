"""One client has one address, however it is written."""

import pytest

from relay.mail.ip import canonical


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("10.0.0.5", "10.0.0.5"),
        ("::ffff:10.0.0.5", "10.0.0.5"),
        ("::ffff:a00:5", "10.0.0.5"),
        ("::FFFF:0a00:0005", "10.0.0.5"),
        ("0:0:0:0:0:ffff:10.0.0.5", "10.0.0.5"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::1", "::1"),
        ("", ""),
        ("no address", "no address"),
    ],
)
def test_an_address_has_one_form(written, address):
    assert canonical(written) == address
