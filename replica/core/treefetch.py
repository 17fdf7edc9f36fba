"""Fetching the buckets in which a map differs from one with a known root.

The root is trusted: q replicas attested it. Everything else is checked on its way down: the node digests against the
root, bucket digests against their node, buckets against their digests. What equals the fetcher's own map is never
asked for. Sources need not be trusted, and may differ from want to want; only the slices of a bucket that is larger
than a part come from one source, because they prove nothing one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import starmap

from replica.core.frozen import FrozenMap
from replica.core.layout import LayoutError
from replica.core.state import BucketedMap
from replica.core.tree import (
    EMPTY,
    NODE_FANOUT,
    bucket_digest,
    decode_bucket,
    encode_item,
    node_digest,
    root_digest,
    split_digests,
)
from replica.core.treeparts import Kind, Piece, Want, decode_nodes, decode_pieces

# The one want that is about no node stands beside the nodes under this number.
_TOP = -1


@dataclass(slots=True)
class TreeProgress:
    """What a fetch has done. `buckets_known` grows while digests arrive: it counts buckets found to differ."""

    buckets_fetched: int = 0
    keys_fetched: int = 0  # those in the buckets
    buckets_dropped: int = 0  # differing because they are empty in the wanted map: nothing to fetch
    buckets_known: int = 0
    parts_taken: int = 0
    parts_refused: int = 0
    bytes_taken: int = 0


@dataclass(slots=True)
class _Slices:
    node: int
    bucket: int
    total: int
    data: bytearray = field(default_factory=bytearray)


class TreeFetch:
    """Finds out, part by part, the map with digest `root`: what is as in `mine`, and what is not.

    At most one want per node is outstanding, and slices of at most one bucket are held at a time, BUCKET_BYTES_MAX at
    most. `mine` may change meanwhile: what it is now is kept. No operation may be running in it now.
    """

    def __init__(self, root: bytes, mine: BucketedMap, value_bytes_max: int) -> None:
        self.progress = TreeProgress()
        self._root = root
        self._value_bytes_max = value_bytes_max
        self._mine = mine.frozen()
        self._nodes = self._mine.nodes()
        self._count = self._mine.count()
        self._nodes_known = root_digest(self._nodes, self._count) == root
        # What is not as in `mine`: nodes' bucket digests, joined, and buckets' items, empty if there is nothing.
        self._digests: dict[int, bytes] = {}
        self._buckets: dict[int, tuple[bytes, ...]] = {}
        # What is not known yet: nodes whose bucket digests are wanted, and per node the buckets, in ascending order.
        self._nodes_wanted: dict[int, bytes] = {}
        self._buckets_wanted: dict[int, dict[int, bytes]] = {}
        self._outstanding: dict[int, Want] = {}
        self._slices: _Slices | None = None
        # Nodes whose next bucket is sliced, and which wait until the slices of another one are complete.
        self._sliced_later: set[int] = set()

    @property
    def is_complete(self) -> bool:
        """Say whether nothing is left to fetch."""
        return self._nodes_known and not self._nodes_wanted and not self._buckets_wanted

    @property
    def slicing(self) -> int | None:
        """The node of the bucket whose slices are being collected, or None."""
        return None if self._slices is None else self._slices.node

    def result(self) -> FrozenMap:
        """Return the map with the wanted root.

        RuntimeError before the fetch is complete; LayoutError if the root is no map's, which no correct replica says.
        """
        if not self.is_complete:
            raise RuntimeError("the fetch is not complete")
        buckets = {number: items for number, items in {**self._mine.buckets, **self._buckets}.items() if items}
        if sum(map(len, buckets.values())) != self._count:
            raise LayoutError("every part is right and the root is not: its number of keys is wrong")
        digests = {
            node: joined
            for node, joined in {**self._mine.digests, **self._digests}.items()
            if self._nodes[node] != EMPTY
        }
        return FrozenMap(buckets, digests, self._nodes, self._count)

    def wants(self, limit: int) -> list[Want]:
        """Return up to `limit` wants that are not outstanding; each is from now on, until `take` or `lost`."""
        found: list[Want] = []
        for node, want in self._askable():
            if len(found) >= limit:
                break
            self._outstanding[node] = want
            found.append(want)
        return found

    def lost(self, want: Want) -> None:
        """Note that a want will not be answered, so that it is asked again; slices are asked for from the first one."""
        if self._outstanding.get(_place(want)) == want:
            self._close(want, dropping_slices=True)

    def take(self, want: Want, data: bytes) -> bool:
        """Take the answer to a want; False, and nothing happened, if that is not outstanding, or has to wait.

        LayoutError if the answer is not what was asked for: nothing was taken, and it will be asked for again. Only
        answers of the replica that was asked may be handed in.
        """
        if self._outstanding.get(_place(want)) != want:
            return False
        try:
            taken = self._take(want, data)
        except LayoutError:
            self.progress.parts_refused += 1
            self._close(want, dropping_slices=True)
            raise
        self._close(want, dropping_slices=False)
        if taken:
            self.progress.parts_taken += 1
            self.progress.bytes_taken += len(data)
        return taken

    def _askable(self) -> Iterator[tuple[int, Want]]:
        """Yield what can be asked, what was begun first."""
        if not self._nodes_known:
            if _TOP not in self._outstanding:
                yield _TOP, Want(Kind.NODES)
            return
        slices = self._slices
        if slices is not None and slices.node not in self._outstanding:
            yield slices.node, Want(Kind.BUCKETS, slices.node, (slices.bucket,), len(slices.data))
        for node, buckets in self._buckets_wanted.items():
            if node not in self._outstanding and node not in self._sliced_later and not self._is_slicing(node):
                yield node, Want(Kind.BUCKETS, node, tuple(buckets))
        for node in self._nodes_wanted:
            if node not in self._outstanding:
                yield node, Want(Kind.DIGESTS, node)

    def _is_slicing(self, node: int) -> bool:
        return self._slices is not None and self._slices.node == node

    def _close(self, want: Want, *, dropping_slices: bool) -> None:
        del self._outstanding[_place(want)]
        if dropping_slices and want.offset:
            self._end_slices()

    def _end_slices(self) -> None:
        self._slices = None
        self._sliced_later.clear()

    def _take(self, want: Want, data: bytes) -> bool:
        if want.kind is Kind.NODES:
            self._take_nodes(data)
        elif want.kind is Kind.DIGESTS:
            self._take_digests(want.node, data)
        else:
            pieces = decode_pieces(want, data)
            if want.offset or not pieces[0].is_whole:
                return self._take_slice(want, pieces[0])
            self._take_buckets(want.node, [(piece.bucket, piece.data) for piece in pieces])
        return True

    def _take_nodes(self, data: bytes) -> None:
        nodes, count = decode_nodes(data)
        if root_digest(nodes, count) != self._root:
            raise LayoutError("node digests of another root")
        self._nodes_known = True
        self._nodes, self._count = nodes, count
        for node, (mine, wanted) in enumerate(zip(self._mine.nodes(), nodes, strict=True)):
            if wanted == mine:
                continue
            if wanted == EMPTY:
                self._compare_buckets(node, (EMPTY,) * NODE_FANOUT)
            else:
                self._nodes_wanted[node] = wanted

    def _take_digests(self, node: int, data: bytes) -> None:
        digests = split_digests(data)
        if node_digest(data) != self._nodes_wanted[node]:
            raise LayoutError(f"bucket digests of another node than {node}")
        del self._nodes_wanted[node]
        self._digests[node] = data
        self._compare_buckets(node, digests)

    def _compare_buckets(self, node: int, digests: tuple[bytes, ...]) -> None:
        wanted: dict[int, bytes] = {}
        for bucket, (mine, digest) in enumerate(zip(self._mine.bucket_digests(node), digests, strict=True)):
            if digest == mine:
                continue
            self.progress.buckets_known += 1
            if digest == EMPTY:
                self._buckets[node * NODE_FANOUT + bucket] = ()
                self.progress.buckets_dropped += 1
            else:
                wanted[bucket] = digest
        if wanted:
            self._buckets_wanted[node] = wanted

    def _take_buckets(self, node: int, buckets: list[tuple[int, bytes]]) -> None:
        """Check all, then replace all."""
        wanted = self._buckets_wanted[node]
        checked = []
        for bucket, content in buckets:
            number = node * NODE_FANOUT + bucket
            if bucket_digest(content) != wanted[bucket]:
                raise LayoutError(f"the content of bucket {number} does not have its digest")
            checked.append((bucket, number, decode_bucket(number, content, self._value_bytes_max)))
        for bucket, number, items in checked:
            self._buckets[number] = tuple(starmap(encode_item, items))
            self.progress.buckets_fetched += 1
            self.progress.keys_fetched += len(items)
            del wanted[bucket]
        if not wanted:
            del self._buckets_wanted[node]

    def _take_slice(self, want: Want, piece: Piece) -> bool:
        if self._slices is None:
            self._slices = _Slices(want.node, piece.bucket, piece.total)
        elif not want.offset:
            self._sliced_later.add(want.node)
            return False
        slices = self._slices
        if piece.total != slices.total:
            raise LayoutError(f"a slice of {piece.total} bytes in all, those before were of {slices.total}")
        slices.data += piece.data
        if len(slices.data) == slices.total:
            self._take_buckets(want.node, [(slices.bucket, bytes(slices.data))])
            self._end_slices()
        return True


def _place(want: Want) -> int:
    return _TOP if want.kind is Kind.NODES else want.node
