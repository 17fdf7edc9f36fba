"""Merkle trees against RFC 9162's own recursive definitions, the published vectors, and every wrong path."""

from __future__ import annotations

import hashlib

import pytest

from trustlog import VerificationError
from trustlog.merkle import MerkleTree, leaf_hash, node_hash, root_of_path

# The tree that implementations of Certificate Transparency share (RFC 6962 hashes as RFC 9162 does): leaves and roots.
PUBLISHED = [
    ("", "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"),
    ("00", "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"),
    ("10", "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"),
    ("2021", "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"),
    ("3031", "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4"),
    ("40414243", "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"),
    ("5051525354555657", "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"),
    ("606162636465666768696a6b6c6d6e6f", "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"),
]
SIZES = [*range(1, 21), 31, 32, 33, 100]


def leaves_of(size: int) -> list[bytes]:
    return [leaf_hash(b"leaf %d" % at) for at in range(size)]


def split(size: int) -> int:
    """The largest power of two below `size` (RFC 9162, section 2.1.1)."""
    return 1 << (size - 1).bit_length() - 1


def recursive_root(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return node_hash(recursive_root(leaves[:k]), recursive_root(leaves[k:]))


def recursive_path(place: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 9162, section 2.1.3.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if place < k:
        return [*recursive_path(place, leaves[:k]), recursive_root(leaves[k:])]
    return [*recursive_path(place - k, leaves[k:]), recursive_root(leaves[:k])]


def reached(leaf: bytes, place: int, size: int, path: list[bytes]) -> bytes | str:
    """The root that a path leads to, or why it leads nowhere."""
    try:
        return root_of_path(leaf, place, size, path)
    except VerificationError as error:
        return error.reason


def test_the_published_roots():
    for size in range(1, len(PUBLISHED) + 1):
        tree = MerkleTree([leaf_hash(bytes.fromhex(data)) for data, _ in PUBLISHED[:size]])
        assert tree.root.hex() == PUBLISHED[size - 1][1]


def test_leaves_and_nodes_cannot_be_taken_for_each_other():
    a, b = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(a + b) != node_hash(a, b)
    assert leaf_hash(b"") == hashlib.sha256(b"\0").digest()


@pytest.mark.parametrize("size", SIZES)
def test_every_path_of_every_size(size):
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    assert tree.size == size
    assert tree.root == recursive_root(leaves)
    for place, leaf in enumerate(leaves):
        path = tree.path(place)
        assert path == recursive_path(place, leaves)
        assert tree.find(leaf) == place
        assert root_of_path(leaf, place, size, path) == tree.root


@pytest.mark.parametrize("size", range(1, 21))
def test_a_wrong_path_leads_nowhere(size):
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    for place, leaf in enumerate(leaves):
        path = tree.path(place)
        wrong = [path[:-1]] if path else []
        wrong += [[*path, path[-1] if path else leaf], [bytes(32), *path]]
        wrong += [[*path[:at], bytes(32), *path[at + 1 :]] for at in range(len(path))]
        for other in wrong:
            assert reached(leaf, place, size, other) != tree.root
        # The same path from another place of the same tree, or beyond it.
        for other_place in set(range(size + 2)) - {place}:
            assert reached(leaf, other_place, size, path) != tree.root


def test_a_tree_needs_leaves_and_has_no_others():
    with pytest.raises(ValueError, match="at least one"):
        MerkleTree([])
    tree = MerkleTree(leaves_of(5))
    assert tree.find(leaf_hash(b"none")) is None
    for place in (-1, 5):
        with pytest.raises(IndexError):
            tree.path(place)


def test_a_leaf_is_found_at_its_place_and_not_across_two():
    first, second = bytes(16) + b"\1" * 16, b"\2" * 16 + bytes(16)
    across = b"\1" * 16 + b"\2" * 16
    assert MerkleTree([first, second]).find(across) is None
    assert MerkleTree([first, second, across]).find(across) == 2
