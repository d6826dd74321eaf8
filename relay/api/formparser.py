"""Forms out of the octets of a body, as they come: multipart/form-data (RFC 7578) and urlencoded. Pure.

A parser is fed pieces of any size and holds what it has read once, not many times: the standard
library's takes nine times an urlencoded body's size. Fields (all that is no file) are at most 8 MiB
together, since each becomes text; there are at most 10,000 parts. A file is as large as the body may be.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Protocol
from urllib.parse import unquote, unquote_to_bytes

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from relay.api.mailgun import ApiError, File, Form

__all__ = ["FIELDS_OCTETS", "FormParser", "parser_for"]

FIELDS_OCTETS = 8 * 1024 * 1024
_MOST_FIELDS = 10_000
_HEADER_OCTETS = 4096
_HEADER_FIELDS = 16

# A name that a stranger made up would stay in Python's codec cache for ever.
_CHARSETS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "utf-8",
    "iso-8859-1": "iso-8859-1",
    "windows-1252": "windows-1252",
}
_EXTENDED_FILENAME = re.compile(
    r";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s\"]*)", re.IGNORECASE
)


class FormParser(Protocol):
    """`feed` all pieces, then `end`; either may raise `ApiError`."""

    def feed(self, piece: bytes) -> None:
        """Take the next octets."""

    def end(self) -> Form:
        """There are no more."""


def parser_for(content_type: str) -> FormParser | None:
    """What reads a body of this type (the field's whole value); None: it is no form."""
    kind, options = parse_options_header(content_type)
    if kind == "multipart/form-data":
        return _Multipart(options.get("boundary", ""))
    if kind == "application/x-www-form-urlencoded":
        return _Urlencoded()
    return None


class _Urlencoded:
    """`name=value&name=value`, escaped."""

    def __init__(self) -> None:
        self._fields: list[tuple[str, str]] = []
        self._carried = b""
        self._name = b""
        self._value: list[bytes] | None = None
        self._octets = 0

    def feed(self, piece: bytes) -> None:
        piece = self._carried + piece
        # An escape that is not whole yet waits for the next piece.
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
        """More of the field that is under way."""
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
            _add_field(self._fields, name, value, 0)
        self._name, self._value = b"", None


class _Multipart:
    """Parts between boundaries, by the library `multipart`."""

    def __init__(self, boundary: str) -> None:
        try:
            self._parser = PushMultipartParser(
                boundary.encode(),
                max_header_size=_HEADER_OCTETS,
                max_header_count=_HEADER_FIELDS,
            )
        except MultipartError as error:
            raise _not_a_form() from error
        self._fields: list[tuple[str, str]] = []
        self._files: list[File] = []
        self._segment: MultipartSegment | None = None
        self._content: list[bytes] = []
        self._octets = 0

    def feed(self, piece: bytes) -> None:
        try:
            for event in self._parser.parse(piece):
                if isinstance(event, MultipartSegment):
                    self._segment = event
                elif event is not None:
                    self._go_on(event)
                elif self._segment is not None:
                    self._end_part(self._segment)
        except MultipartError as error:
            raise _not_a_form() from error

    def end(self) -> Form:
        try:
            self._parser.close()
        except MultipartError as error:
            raise _not_a_form() from error
        return Form(tuple(self._fields), tuple(self._files))

    def _go_on(self, octets: bytes) -> None:
        if self._segment is not None and not _filename(self._segment):
            self._octets += len(octets)
            _check_octets(self._octets)
        self._content.append(bytes(octets))

    def _end_part(self, segment: MultipartSegment) -> None:
        if not segment.name:
            raise ApiError(400, "the form has a part without a name")
        content = _transfer_decoded(b"".join(self._content), _header(segment, "transfer-encoding"))
        self._content.clear()
        if filename := _filename(segment):
            kind = _header(segment, "type") or "application/octet-stream"
            if len(self._fields) + len(self._files) >= _MOST_FIELDS:
                raise _too_many()
            self._files.append(File(segment.name, filename, kind, content))
        else:
            value = _text(content, segment.charset or "utf-8")
            _add_field(self._fields, segment.name, value, len(self._files))


def _add_field(fields: list[tuple[str, str]], name: str, value: str, files: int) -> None:
    if len(fields) + files >= _MOST_FIELDS:
        raise _too_many()
    fields.append((name, value))


def _check_octets(octets: int) -> None:
    if octets > FIELDS_OCTETS:
        raise ApiError(
            413,
            f"the fields of the form are larger than {FIELDS_OCTETS // 1024**2} MiB together;"
            " what is larger goes as a file, or to messages.mime",
        )


def _header(segment: MultipartSegment, name: str) -> str:
    """The value of a part's `Content-…` field, "" where there is none."""
    wanted = f"content-{name}"
    return next((value for field, value in segment.headerlist if field.lower() == wanted), "")


def _filename(segment: MultipartSegment) -> str:
    """The name of a file; "": the part is a field. `filename*` (RFC 8187) is what some clients say."""
    if segment.filename is not None:
        return str(segment.filename)
    extended = _EXTENDED_FILENAME.search(_header(segment, "disposition"))
    return unquote(extended[2], extended[1]) if extended else ""


def _transfer_decoded(content: bytes, encoding: str) -> bytes:
    """What a part holds, as it was before its transfer encoding."""
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
