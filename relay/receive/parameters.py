"""The parameters of MAIL and RCPT.

    MAIL   SIZE (RFC 1870)  BODY (RFC 6152)  SMTPUTF8 (RFC 6531)  RET ENVID (RFC 3461)
           AUTH (RFC 4954)  REQUIRETLS (RFC 8689)
    RCPT   NOTIFY ORCPT (RFC 3461)

Keywords may be in any case; values keep theirs, because the case of xtext and addresses has a
meaning. An unknown parameter is refused with 555, a known one with a wrong value with 501, both
5.5.4 (RFC 5321 §4.1.1.11, RFC 3463 §3.6). AUTH names who first submitted the mail. The relay only
checks its form: to use its value, the relay would have to trust its clients.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from relay.mail.envelope import Body, Notify, Recipient, Ret
from relay.mail.reply import Reply
from relay.receive.session import Transaction

_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*+)(?:=([^\x00-\x20\x7f=][^\x00-\x20\x7f]*+))?")
_XTEXT = re.compile(r"[!-*,-<>-~]*+(?:\+[0-9A-F]{2}[!-*,-<>-~]*+)*")
_UNITEXT = re.compile(
    r"[!-*,-<>-~\u0080-\U0010ffff]*+(?:\+[0-9A-F]{2}[!-*,-<>-~\u0080-\U0010ffff]*+)*"
)
_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*/?^_`{|}~-]++")
_ENVID_OCTETS = 100
_ORCPT_OCTETS = 500


class ParameterError(ValueError):
    """A parameter that cannot be obeyed; `reply` says which."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


def mail_parameters(rest: bytes, reverse_path: str) -> Transaction:
    """A transaction with the parameters of MAIL."""
    transaction = Transaction(reverse_path)
    if rest:
        for keyword, value in _split(rest):
            if keyword not in _MAIL:
                raise _unknown(keyword)
            _MAIL[keyword](transaction, value)
    return transaction


def rcpt_parameters(rest: bytes, address: str, domain: str, *, smtputf8: bool) -> Recipient:
    """A recipient with the parameters of RCPT."""
    notify: frozenset[Notify] = frozenset()
    orcpt = ""
    if rest:
        for keyword, value in _split(rest):
            if keyword == "NOTIFY":
                notify = _notify(value)
            elif keyword == "ORCPT":
                orcpt = _orcpt(value, smtputf8=smtputf8)
            else:
                raise _unknown(keyword)
    return Recipient(address, domain, notify, orcpt)


def wants_smtputf8(rest: bytes) -> bool:
    """Whether SMTPUTF8 is among the parameters, which decides how to read the address."""
    return b"SMTPUTF8" in rest.upper().split()


def _split(rest: bytes) -> list[tuple[str, str]]:
    try:
        words = rest.decode("utf-8").replace("\t", " ").split(" ")
    except UnicodeDecodeError:
        raise ParameterError(
            Reply(501, "5.5.4", "Parameters are neither ASCII nor UTF-8")
        ) from None
    parameters: list[tuple[str, str]] = []
    seen: set[str] = set()
    for word in words:
        if not word:
            continue
        match = _PARAMETER.fullmatch(word)
        if match is None:
            raise ParameterError(Reply(501, "5.5.4", "Malformed parameter"))
        keyword = match[1].upper()
        if keyword in seen:
            raise _bad(keyword)
        seen.add(keyword)
        parameters.append((keyword, match[2] or ""))
    return parameters


def _unknown(keyword: str) -> ParameterError:
    return ParameterError(Reply(555, "5.5.4", f"Parameter {keyword[:40]} is not known here"))


def _bad(keyword: str) -> ParameterError:
    return ParameterError(Reply(501, "5.5.4", f"Parameter {keyword[:40]} is badly said"))


def _size(transaction: Transaction, value: str) -> None:
    if not (value.isascii() and value.isdigit()) or len(value) > 20:
        raise _bad("SIZE")
    transaction.size_bytes = int(value)


def _body(transaction: Transaction, value: str) -> None:
    try:
        transaction.body = Body(value.upper())
    except ValueError:
        raise _bad("BODY") from None


def _smtputf8(transaction: Transaction, value: str) -> None:
    if value:
        raise _bad("SMTPUTF8")
    transaction.smtputf8 = True


def _requiretls(transaction: Transaction, value: str) -> None:
    if value:
        raise _bad("REQUIRETLS")
    transaction.requiretls = True


def _ret(transaction: Transaction, value: str) -> None:
    try:
        transaction.ret = Ret(value.upper())
    except ValueError:
        raise _bad("RET") from None


def _envid(transaction: Transaction, value: str) -> None:
    if not value or len(value) > _ENVID_OCTETS or not _XTEXT.fullmatch(value):
        raise _bad("ENVID")
    transaction.envid = value


def _auth(_: Transaction, value: str) -> None:
    if not value or not _XTEXT.fullmatch(value):
        raise _bad("AUTH")


_MAIL: dict[str, Callable[[Transaction, str], None]] = {
    "SIZE": _size,
    "BODY": _body,
    "SMTPUTF8": _smtputf8,
    "RET": _ret,
    "ENVID": _envid,
    "AUTH": _auth,
    "REQUIRETLS": _requiretls,
}


def _notify(value: str) -> frozenset[Notify]:
    """NEVER alone, or a list of the others (RFC 3461 §4.1)."""
    try:
        wanted = frozenset(Notify(word) for word in value.upper().split(","))
    except ValueError:
        raise _bad("NOTIFY") from None
    if Notify.NEVER in wanted and len(wanted) > 1:
        raise _bad("NOTIFY")
    return wanted


def _orcpt(value: str, *, smtputf8: bool) -> str:
    """addr-type;xtext (RFC 3461 §4.2); of type utf-8 in the forms of RFC 6533 §3."""
    addr_type, _, text = value.partition(";")
    is_utf8 = addr_type.lower() == "utf-8" and (smtputf8 or text.isascii())
    form = _UNITEXT if is_utf8 else _XTEXT
    is_good = text and _ATOM.fullmatch(addr_type) and form.fullmatch(text)
    if not is_good or len(value.encode()) > _ORCPT_OCTETS:
        raise _bad("ORCPT")
    return value
