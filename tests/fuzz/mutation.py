"""Inputs by chance: seeds with words put in, taken out, doubled and turned around."""

from __future__ import annotations

from random import Random

from tests.fuzz.targets import WORDS


def mutated(random: Random, seeds: list[bytes]) -> bytes:
    """A seed, changed a little or much."""
    octets = bytearray(random.choice(seeds))
    for _ in range(random.choice([1, 2, 3, 5, 10, 30])):
        at = random.randrange(len(octets) + 1)
        match random.randrange(6):
            case 0 | 1 | 2:
                octets[at:at] = random.choice(WORDS)
            case 3:
                del octets[at : at + random.randrange(1, 12)]
            case 4:
                octets[at : at + 1] = bytes([random.randrange(256)])
            case _:
                piece = octets[at : at + random.randrange(1, 60)]
                octets[at:at] = piece
    return bytes(octets)
