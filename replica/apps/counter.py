"""A counter: the shortest application that remembers something."""

from replica.application import Context


class Counter:
    """Any operation adds one; the result is the new count as decimal text."""

    def apply(self, operation: bytes, context: Context) -> bytes:  # noqa: ARG002 - the content does not matter
        """Add one and return the count."""
        count = int(context.state.get(b"count") or b"0") + 1
        context.state.put(b"count", b"%d" % count)
        return b"%d" % count
