"""Merkle trees as RFC 9162 has them (Certificate Transparency 2.0, sections 2.1.1 to 2.1.3).

    leaf = SHA-256(0x00 || data)        node = SHA-256(0x01 || left || right)

The left subtree of a node is the largest complete one that leaves something for the right: level by level, neighbours
are joined, and one that has no neighbour goes up as it is. A path names no directions: they follow from the leaf's
place and the tree's size, which therefore must be attested beside the root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from trustlog.errors import VerificationError
from trustlog.hashing import HASH_SIZE


def leaf_hash(data: bytes) -> bytes:
    """Hash of a leaf (32 bytes) with ``data`` of any length."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of a node (32 bytes) above two hashes of 32 bytes each."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class MerkleTree:
    """A tree over at least one leaf hash (32 bytes each). Takes two hashes of memory per leaf."""

    __slots__ = ("_levels",)

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ValueError("a tree has at least one leaf")
        level = list(leaves)
        levels = [b"".join(level)]
        while len(level) > 1:
            joined = [node_hash(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
            level = joined + level[len(joined) * 2 :]
            levels.append(b"".join(level))
        self._levels = tuple(levels)

    @property
    def size(self) -> int:
        """The number of leaves."""
        return len(self._levels[0]) // HASH_SIZE

    @property
    def root(self) -> bytes:
        """The root hash, 32 bytes."""
        return self._levels[-1]

    def find(self, leaf: bytes) -> int | None:
        """Return the place of a leaf hash, from 0, or None if there is no such leaf."""
        at = self._levels[0].find(leaf)
        while at % HASH_SIZE and at >= 0:  # across two leaves: chance, or malice
            at = self._levels[0].find(leaf, at + 1)
        return None if at < 0 else at // HASH_SIZE

    def path(self, place: int) -> list[bytes]:
        """Return the hashes that lead from the leaf at ``place`` to the root; IndexError if there is no such leaf."""
        if not 0 <= place < self.size:
            raise IndexError(f"there is no leaf {place} among {self.size}")
        found = []
        for level in self._levels[:-1]:
            beside = (place ^ 1) * HASH_SIZE
            if beside < len(level):
                found.append(level[beside : beside + HASH_SIZE])
            place >>= 1
        return found


def root_of_path(leaf: bytes, place: int, size: int, path: Sequence[bytes]) -> bytes:
    """Return the root (32 bytes) to which a path leads from the leaf hash at ``place`` of ``size`` (section 2.1.3.2).

    VerificationError("wrong-path") if a path of a leaf there is longer or shorter, or there is no such leaf.
    """
    if not 0 <= place < size:
        raise VerificationError("wrong-path", f"there is no leaf {place} among {size}")
    reached, at, last = leaf, place, size - 1
    for beside in path:
        if last == 0:
            raise VerificationError("wrong-path", f"the path of {len(path)} hashes goes on above the root")
        if at & 1 or at == last:
            reached = node_hash(beside, reached)
            while not at & 1 and at:  # it went up without a neighbour
                at, last = at >> 1, last >> 1
        else:
            reached = node_hash(reached, beside)
        at, last = at >> 1, last >> 1
    if last:
        raise VerificationError("wrong-path", f"the path of {len(path)} hashes ends below the root")
    return reached
