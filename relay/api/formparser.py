"""Parses a form from the pieces of a body: multipart/form-data (RFC 7578) or urlencoded. Pure.

A parser takes pieces of any size, and keeps the octets once (the standard library's parser needs
nine times the size of an urlencoded body). The fields that are no files have at most 8 MiB
together, because each becomes text. There are at most 10,000 fields and files. A file may be as
large as the body.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote, unquote_to_bytes

from relay.api.mailgun_form import ApiError, File, Form, shown

FIELDS_OCTETS = 8 * 1024 * 1024
_MOST_FIELDS = 10_000
_HEADER_OCTETS = 4096
_HEADER_FIELDS = 16
_BOUNDARY_CHARS = 200
"""RFC 2046 §5.1.1 has 70."""

# Only these: Python would keep each name that a stranger made up in its codec cache.
_CHARSETS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "utf-8",
    "iso-8859-1": "iso-8859-1",
    "windows-1252": "windows-1252",
}
_PARAMETER = re.compile(r';\s*([\w*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)', re.DOTALL)
_EXTENDED = re.compile(r"(utf-8|iso-8859-1)'[^']*'(.*)", re.IGNORECASE)


class FormParser(Protocol):
    """Takes the pieces of a body in order, then `end`. Both may raise `ApiError`."""

    def feed(self, piece: bytes) -> None:
        """Take the next octets."""

    def end(self) -> Form:
        """The form, after the last piece."""


def parser_for(content_type: str) -> FormParser | None:
    """A parser for a body of this Content-Type (the whole value); None if that is no form."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _Multipart(_parameters(content_type).get("boundary", ""))
    if kind == "application/x-www-form-urlencoded":
        return _Urlencoded()
    return None


class _Urlencoded:
    """Parses `name=value&name=value`, with escapes."""

    def __init__(self) -> None:
        self._fields: list[tuple[str, str]] = []
        self._carried = b""
        self._name = b""
        self._value: list[bytes] | None = None
        self._octets = 0

    def feed(self, piece: bytes) -> None:
        piece = self._carried + piece
        # An incomplete escape waits for the next piece.
        cut = piece.find(b"%", max(len(piece) - 2, 0))
        piece, self._carried = (piece, b"") if cut < 0 else (piece[:cut], piece[cut:])
        self._take(piece)

    def end(self) -> Form:
        self._take(self._carried)
        self._end_field()
        return Form(tuple(self._fields))

    def _take(self, piece: bytes) -> None:
        self._octets += len(piece)
        _check_octets(self._octets)
        first, *others = piece.split(b"&")
        self._go_on(first)
        for part in others:
            self._end_field()
            self._go_on(part)

    def _go_on(self, part: bytes) -> None:
        """Add a part of the present field."""
        if self._value is None:
            name, equals, part = part.partition(b"=")
            self._name += _unquoted(name)
            if not equals:
                return
            self._value = []
        self._value.append(_unquoted(part))

    def _end_field(self) -> None:
        if self._name or self._value is not None:
            name, value = _text(self._name), _text(b"".join(self._value or ()))
            if len(self._fields) >= _MOST_FIELDS:
                raise _too_many()
            self._fields.append((name, value))
        self._name, self._value = b"", None


class _Multipart:
    """Parses parts between boundaries (RFC 2046 §5.1.1). `_step` reads on, as far as it can.

    `_step` is a function and no bound method, because a parser that refers to itself would stay in
    memory, with all that it has read, until the next garbage collection.
    """

    def __init__(self, boundary: str) -> None:
        if not 0 < len(boundary) <= _BOUNDARY_CHARS:
            raise _not_a_form()
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = bytearray(b"\r\n")  # the first boundary may be the first line
        self._step: Callable[[_Multipart], bool] = _Multipart._preamble
        self._part = _Part({})
        self._content: list[bytes] = []
        self._fields: list[tuple[str, str]] = []
        self._files: list[File] = []
        self._octets = 0

    def feed(self, piece: bytes) -> None:
        self._buffer += piece
        while self._step(self):
            pass

    def end(self) -> Form:
        if self._step is not _Multipart._epilogue:
            raise _not_a_form()
        return Form(tuple(self._fields), tuple(self._files))

    def _preamble(self) -> bool:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            del self._buffer[: -len(self._delimiter)]
            return False
        del self._buffer[: at + len(self._delimiter)]
        self._step = _Multipart._behind_boundary
        return True

    def _behind_boundary(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self._step = _Multipart._epilogue
        elif self._buffer.startswith(b"\r\n"):
            self._step = _Multipart._header
        else:
            raise _not_a_form()
        del self._buffer[:2]
        return True

    def _header(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end > _HEADER_OCTETS or (end < 0 and len(self._buffer) > _HEADER_OCTETS + 4):
            raise _not_a_form()
        if end < 0:
            return False
        self._part = _Part.of(bytes(self._buffer[:end]))
        if len(self._fields) + len(self._files) >= _MOST_FIELDS:
            raise _too_many()
        del self._buffer[: end + 4]
        self._step = _Multipart._body
        return True

    def _body(self) -> bool:
        at = self._buffer.find(self._delimiter)
        end = at if at >= 0 else max(len(self._buffer) - len(self._delimiter), 0)
        if not self._part.filename:
            self._octets += end
            _check_octets(self._octets)
        self._content.append(bytes(self._buffer[:end]))
        del self._buffer[:end]
        if at < 0:
            return False
        del self._buffer[: len(self._delimiter)]
        self._end_part(self._part)
        self._step = _Multipart._behind_boundary
        return True

    def _epilogue(self) -> bool:
        self._buffer.clear()
        return False

    def _end_part(self, part: _Part) -> None:
        content = _transfer_decoded(
            b"".join(self._content), part.header.get("content-transfer-encoding", "")
        )
        self._content.clear()
        kind = part.header.get("content-type", "")
        if part.filename:
            self._files.append(File(part.name, part.filename, kind, content))
        else:
            charset = _parameters(kind).get("charset", "utf-8")
            self._fields.append((part.name, _text(content, charset)))


@dataclass(frozen=True, slots=True)
class _Part:
    """The header section of a part. `filename` "": the part is a field and no file."""

    header: Mapping[str, str]
    name: str = ""
    filename: str = ""

    @classmethod
    def of(cls, octets: bytes) -> _Part:
        lines = re.sub(r"\r\n[ \t]+", " ", _text(octets)).split("\r\n")
        if len(lines) > _HEADER_FIELDS:
            raise _not_a_form()
        pairs = [line.partition(":") for line in lines]
        header = {name.strip().lower(): value.strip() for name, _, value in pairs}
        says = _parameters(header.get("content-disposition", ""))
        filename = says.get("filename", "")
        if not filename and (extended := _EXTENDED.fullmatch(says.get("filename*", ""))):
            filename = unquote(extended[2], extended[1])  # RFC 8187
        if not says.get("name"):
            raise ApiError(400, "the form has a part without a name")
        if header.get("content-type", "").lower().startswith("multipart/"):
            raise ApiError(
                400, f"{shown(says['name'])}: a part of a form cannot be multipart itself"
            )
        return cls(header, says["name"], filename)


def _parameters(value: str) -> dict[str, str]:
    """The parameters in the value of a header field."""
    return {name.lower(): _bare(text) for name, text in _PARAMETER.findall(value)}


def _bare(text: str) -> str:
    """A parameter's value without quotes and escapes (RFC 9110 §5.6.4, or as browsers escape)."""
    if text[:1] != '"':
        return text
    text = text[1:-1]
    if '\\"' in text:
        return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
    return text.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def _check_octets(octets: int) -> None:
    if octets > FIELDS_OCTETS:
        raise ApiError(
            413,
            f"the fields of the form are larger than {FIELDS_OCTETS // 1024**2} MiB together;"
            " what is larger goes as a file, or to messages.mime",
        )


def _transfer_decoded(content: bytes, encoding: str) -> bytes:
    """The content of a part without its transfer encoding."""
    match encoding.strip().lower():
        case "" | "7bit" | "8bit" | "binary":
            return content
        case "base64":
            try:
                return base64.b64decode(content)
            except binascii.Error as error:
                raise _not_a_form() from error
        case "quoted-printable":
            return binascii.a2b_qp(content)
    raise _not_a_form()


def _unquoted(octets: bytes) -> bytes:
    return unquote_to_bytes(octets.replace(b"+", b" "))


def _text(octets: bytes, charset: str = "utf-8") -> str:
    codec = _CHARSETS.get(charset.strip().lower())
    try:
        if codec is not None:
            return octets.decode(codec)
    except UnicodeDecodeError as error:
        raise _not_a_form() from error
    raise _not_a_form()


def _too_many() -> ApiError:
    return ApiError(400, f"the form has too many fields, max is {_MOST_FIELDS}")


def _not_a_form() -> ApiError:
    return ApiError(400, "the form cannot be read as multipart/form-data or urlencoded UTF-8")
