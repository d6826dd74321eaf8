"""All parameters of a message, and what the relay does with each. Pure.

The relay obeys a parameter; or ignores it, as docs/moving-from-mailgun.md says; or refuses the
message and names the parameter. It refuses a message with an unknown parameter, so that no wish of
a client is lost without a word.

Clients write the same name in several ways. `attachment[0]` and `to[]` are lists in PHP and Ruby.
The case of a name is ignored, except behind `h:` and `v:`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from relay.api.mailgun_form import ApiError, File, Form, shown

OBEYED = frozenset(
    {
        "o:deliver-within",
        "o:deliverytime",
        "o:dkim",
        "o:require-tls",
        "o:skip-verification",
        "o:tag",
        "o:testmode",
    }
)
"""Options that the relay obeys."""

IGNORED = frozenset(
    {
        "o:campaign",
        "o:deliverytime-optimize-period",
        "o:sending-ip-pool",
        "o:time-zone-localize",
        "o:tracking",
        "o:tracking-clicks",
        "o:tracking-opens",
        "o:tracking-pixel-location-top",
    }
)
"""Options without a meaning for a relay: the message is the same without them."""

REFUSED = frozenset(
    {
        "o:archive-to",
        "o:secondary-dkim",
        "o:secondary-dkim-public",
        "o:sending-ip",
        "o:suppress-headers",
        "recipient-variables",
        "template",
    }
)
"""Options that would change the message, and are not supported. Unknown names are refused, too."""

_CONTENT = frozenset({"from", "to", "cc", "bcc", "subject", "text", "html", "amp-html"})
MADE_ALREADY = frozenset({"from", "to", "cc", "bcc", "subject"})
"""Parameters beside a complete message. `subject` is ignored: the message has its own."""

FILES = frozenset({"attachment", "inline"})

_ONCE = frozenset({"subject", "text", "html", "amp-html", "o:deliverytime", "o:deliver-within"})
_OF_A_LIST = re.compile(r"([^\[\]]+)\[[0-9]*\]")
_KEEPS_CASE = ("h:", "v:")


def checked_message(form: Form) -> Form:
    """The form of `messages`, with the names of the tables. 400 for an unknown name."""
    return _checked(form, _CONTENT, FILES)


def checked_mime(form: Form) -> Form:
    """The form of `messages.mime`."""
    return _checked(form, MADE_ALREADY, frozenset({"message"}))


def _checked(form: Form, content: frozenset[str], files: frozenset[str]) -> Form:
    fields = [(_plain(name), value) for name, value in form.fields]
    kept_files: list[File] = []
    for file in form.files:
        name = _plain(file.name)
        if name in files:
            kept_files.append(replace(file, name=name))
        else:
            fields.append((name, _as_text(file, name)))
    for name, value in fields:
        _check(name, value, content, files)
    plain = Form(tuple(pair for pair in fields if pair[0] not in IGNORED), tuple(kept_files))
    for name in _ONCE:
        if len(set(plain.all(name))) > 1:
            raise ApiError(400, f"{name} parameter is there more than once")
    return plain


def _plain(name: str) -> str:
    """A name in the form of the tables."""
    prefix, rest = name[:2].lower(), name[2:]
    if prefix == "v:":
        return prefix + rest
    match = _OF_A_LIST.fullmatch(name)
    name = match[1] if match else name
    return prefix + name[2:] if prefix in _KEEPS_CASE else name.lower()


def _as_text(file: File, name: str) -> str:
    """The value of a field that came as a file, as `curl -F text=@letter.txt` sends it."""
    try:
        return file.content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, f"{shown(name)} parameter is not UTF-8") from None


def _check(name: str, value: str, content: frozenset[str], files: frozenset[str]) -> None:
    if name in content or name in OBEYED or name in IGNORED or name.startswith(_KEEPS_CASE):
        return
    if name in files:
        if value:  # "" comes from a browser, for a file that nobody chose
            raise ApiError(400, f"'{name}' parameter is not a file")
        return
    is_known = name in REFUSED or name.startswith("t:")
    if value or not is_known:  # a known name without a value asks for nothing
        raise ApiError(400, f"{shown(name)} parameter is not supported by this relay")
