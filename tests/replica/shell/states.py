"""A state store for tests, which works out the maps of the milestones that it is given: a core has them."""

from dataclasses import replace

from replica.core.frozen import FrozenMap
from replica.core.state import BucketedMap
from replica.core.tree import KEY_BYTES_MAX
from replica.shell.statestore import TREES, Milestone, StateStore

NONE: tuple = ()  # maps that are to be worked out


def frozen(content: dict[bytes, bytes]) -> FrozenMap:
    return BucketedMap(content.items()).frozen()


class Read:
    """Changes that were read to their end, or to where their source failed: to be read again, failures included."""

    def __init__(self, source) -> None:
        self.items = []
        self._failed = None
        try:
            self.items.extend(source)  # what came before a failure stays
        except Exception as error:
            self._failed = error

    def __iter__(self):
        yield from self.items
        if self._failed is not None:
            raise self._failed


class MappedStore(StateStore):
    """Milestones without maps get those of what was written before, or is in the file at first, and their changes."""

    _held: tuple[dict[bytes, bytes], ...] | None = None

    def write(self, milestone: Milestone, *, replace_all: bool = False) -> None:
        changes = tuple(map(Read, milestone.changes))
        held = [dict(content) for content in (({},) * TREES if replace_all else self._before())]
        for content, found in zip(held, changes, strict=True):
            for key, value in found.items:
                content.pop(key, None)
                if isinstance(key, bytes) and isinstance(value, bytes) and len(key) <= KEY_BYTES_MAX:
                    content[key] = value
        maps = milestone.maps or tuple(map(frozen, held))
        super().write(replace(milestone, changes=changes, maps=maps), replace_all=replace_all)
        self._held = tuple(held)

    def discard(self, *why: str):
        self._held = None
        return super().discard(*why)

    def _before(self) -> tuple[dict[bytes, bytes], ...]:
        if self._held is not None:
            return self._held
        view = self.load()
        if view is None:
            return ({},) * TREES
        with view:
            return tuple(dict(tree.entries()) for tree in view.trees)
