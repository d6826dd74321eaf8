"""Another worker, asked through its control socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

from relay.admin.control_socket import REQUEST_BYTES
from relay.admin.requests import RequestError
from relay.mail.jsontext import JsonDocument, of_json

_LINE_BYTES = 64 * REQUEST_BYTES
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0


class OtherWorker:
    """A worker by its number. `path`: its socket."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self._path = path

    async def ask(self, request: Mapping[str, object]) -> JsonDocument:
        """What came of a request: the end of its answer. `RequestError` names the worker."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_BYTES)
        except (OSError, TimeoutError):
            raise RequestError(f"worker {self.number} does not answer; try again") from None
        try:
            writer.write(json.dumps(request).encode("ascii") + b"\n")
            while True:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    line = of_json(await reader.readline() or b'{"error": "its answer broke off"}')
                if "error" in line:
                    raise RequestError(f"worker {self.number}: {line['error']}")
                if "done" in line:
                    done: JsonDocument = line["done"]
                    return done
        except (OSError, TimeoutError, ValueError) as error:
            raise RequestError(f"worker {self.number}: its answer broke off: {error}") from None
        finally:
            writer.close()
