"""Payloads at rest: in the clear, or sealed with a key that the trusted log's service keeps for this replica.

What is sealed: the groups' payloads in the store; keys and values of the state, and the batches in flight, in the state
file. What is not: which logs and indexes there are, attestations, digests and sizes; and the evidence folder, which is
made to be shown. A sealed value is

    salt 16 ‖ AES-256-GCM under HMAC-SHA256(key, "seal" ‖ salt), nonce zero, with its place as associated data

so a value that is moved to another row does not open. A random salt of 16 bytes makes a key of its own for each value:
there is no limit on how many may be sealed. A key of the state is filed under HMAC-SHA256(key, "name" ‖ tree ‖ key),
so the file shows when the same key is written again, and nothing else of it.
"""

import hmac
import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from replica.core.layout import U32

SALT_SIZE = 16
TAG_SIZE = 16
_NONCE = bytes(12)
_PLACE = struct.Struct(">BQQ")


class UnsealError(ValueError):
    """A sealed value does not open: it is damaged, was moved, or belongs to another key."""


class Clear:
    """Leaves everything as it is."""

    mark = ""  # at the end of the file's schema, so that a sealed file is not taken for a damaged one

    def seal(self, kind: bytes, first: int, second: int, plain: bytes) -> bytes:
        """Return what is written at a place: a kind of row (one byte), and two numbers that name it."""
        del kind, first, second
        return plain

    def unseal(self, kind: bytes, first: int, second: int, found: bytes) -> bytes:
        """Return what was sealed at that place; UnsealError if it does not open."""
        del kind, first, second
        return found

    def seal_entry(self, tree: int, key: bytes, value: bytes) -> tuple[bytes, bytes]:
        """Return under which name, and how, an entry of the state is filed."""
        del tree
        return key, value

    def entry_name(self, tree: int, key: bytes) -> bytes:
        """Return the name alone."""
        del tree
        return key

    def unseal_entry(self, tree: int, name: bytes, found: bytes) -> tuple[bytes, bytes]:
        """Return an entry's key and value; UnsealError if it does not open."""
        del tree
        return name, found


class Sealed(Clear):
    """Seals with `key`, 32 bytes."""

    mark = "-sealed"

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, kind: bytes, first: int, second: int, plain: bytes) -> bytes:
        """See Clear."""
        return self._seal(_PLACE.pack(kind[0], first, second), plain)

    def unseal(self, kind: bytes, first: int, second: int, found: bytes) -> bytes:
        """See Clear."""
        return self._unseal(_PLACE.pack(kind[0], first, second), found)

    def seal_entry(self, tree: int, key: bytes, value: bytes) -> tuple[bytes, bytes]:
        """See Clear."""
        name = self.entry_name(tree, key)
        return name, self._seal(b"e" + bytes((tree,)) + name, U32.pack(len(key)) + key + value)

    def entry_name(self, tree: int, key: bytes) -> bytes:
        """See Clear."""
        return hmac.digest(self._key, b"name" + bytes((tree,)) + key, "sha256")

    def unseal_entry(self, tree: int, name: bytes, found: bytes) -> tuple[bytes, bytes]:
        """See Clear."""
        plain = self._unseal(b"e" + bytes((tree,)) + name, found)
        size = U32.size + U32.unpack_from(plain)[0]
        return plain[U32.size : size], plain[size:]

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(hmac.digest(self._key, b"seal" + salt, "sha256"))

    def _seal(self, place: bytes, plain: bytes) -> bytes:
        salt = os.urandom(SALT_SIZE)
        return salt + self._cipher(salt).encrypt(_NONCE, plain, place)

    def _unseal(self, place: bytes, found: bytes) -> bytes:
        if len(found) < SALT_SIZE + TAG_SIZE:
            raise UnsealError("too short to be sealed")
        try:
            return self._cipher(found[:SALT_SIZE]).decrypt(_NONCE, found[SALT_SIZE:], place)
        except InvalidTag as error:
            raise UnsealError("does not open with this key, at this place") from error


CLEAR = Clear()
GROUP, PART = b"g", b"p"
