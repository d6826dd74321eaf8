"""Who listens to the parts of a message, and writes down what it is told."""

from __future__ import annotations

from relay.deliver.mime import Entity


class Scribe:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[bytes] = []

    def header(self, entity: Entity, section: bytes) -> None:
        self.told.append(section)

    def body(self, entity: Entity, octets: bytes) -> None:
        self.told.append(octets)

    def end(self, entity: Entity) -> None:
        pass

    def between(self, octets: bytes) -> None:
        self.told.append(octets)
