r"""Redis' glob patterns: `*`, `?`, `[abc]`, `[a-z]`, `[^a]`, and `\` before what is meant as it stands.

A pattern has at most PATTERN_BYTES_MAX bytes. Matching takes time in proportion to the text's length: all places in the
pattern that may be reached are followed at one time, as the bits of one whole number (Baeza-Yates and Gonnet, A new
approach to text searching, 1992), so no pattern makes it go back.
"""

from dataclasses import dataclass
from typing import Final

# A pattern of steps takes 256 numbers of so many bits.
PATTERN_BYTES_MAX: Final = 1024
_ANY = (1 << 256) - 1


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern ready for matching. All texts begin with `prefix`.

    at: for each byte, the places whose step takes it, as bits. stars: the places before which a star stands. end: the
    place behind the last step.
    """

    prefix: bytes
    at: tuple[int, ...]
    stars: int
    end: int

    def matches(self, text: bytes) -> bool:
        """Say whether the whole text matches."""
        at, stars = self.at, self.stars
        # Bit i: the first i steps have taken all of the text so far.
        reached = 1
        for byte in text:
            reached = ((reached & at[byte]) << 1) | (reached & stars)
            if not reached:
                return False
        return bool(reached >> self.end & 1)


def compile_pattern(pattern: bytes) -> Pattern:
    """Return a pattern ready for matching; ValueError if it is too long."""
    if len(pattern) > PATTERN_BYTES_MAX:
        raise ValueError(f"a pattern has at most {PATTERN_BYTES_MAX} bytes, this one has {len(pattern)}")
    # Each step as the set of the bytes that it takes: 256 bits.
    steps: list[int] = []
    stars = place = 0
    while place < len(pattern):
        byte = pattern[place]
        if byte == ord("*"):
            stars |= 1 << len(steps)
        elif byte == ord("?"):
            steps.append(_ANY)
        elif byte == ord("["):
            wanted, place = _set(pattern, place + 1)
            steps.append(wanted)
        else:
            if byte == ord("\\") and place + 1 < len(pattern):
                place += 1
            steps.append(1 << pattern[place])
        place += 1
    return Pattern(_prefix(steps, stars), _by_byte(steps), stars, len(steps))


def _prefix(steps: list[int], stars: int) -> bytes:
    found = bytearray()
    for place, step in enumerate(steps):
        if stars >> place & 1 or step.bit_count() != 1:
            break
        found.append(step.bit_length() - 1)
    return bytes(found)


def _by_byte(steps: list[int]) -> tuple[int, ...]:
    """Turn the sets of the steps into the places of each byte."""
    at = [0] * 256
    everywhere = 0
    for place, step in enumerate(steps):
        bit, left = 1 << place, step
        if step == _ANY:
            everywhere |= bit
            continue
        while left:
            lowest = left & -left
            at[lowest.bit_length() - 1] |= bit
            left ^= lowest
    return tuple([places | everywhere for places in at])


def _set(pattern: bytes, at: int) -> tuple[int, int]:
    """Return the bytes of the set whose content begins at `at`, as bits, and where its last byte stands."""
    negated = pattern[at : at + 1] == b"^"
    at += negated
    members = 0
    while at < len(pattern) and pattern[at] != ord("]"):
        if pattern[at] == ord("\\") and at + 1 < len(pattern):
            at += 1
            members |= 1 << pattern[at]
        elif pattern[at + 1 : at + 2] == b"-" and at + 2 < len(pattern):
            low, high = sorted((pattern[at], pattern[at + 2]))
            members |= (1 << high + 1) - (1 << low)
            at += 2
        else:
            members |= 1 << pattern[at]
        at += 1
    return (_ANY & ~members if negated else members), at
