"""An append-only ledger: each record gets the next number, and nothing can change it."""

from replica.application import Context, OperationError

NUMBER_DIGITS_MAX = 20


class Ledger:
    """`append <text>` returns the record's number; `read <number>` returns slot, agreed time and text."""

    def apply(self, operation: bytes, context: Context) -> bytes:
        """Carry out `append` or `read`."""
        verb, _, argument = operation.partition(b" ")
        if verb == b"append" and argument:
            number = int(context.state.get(b"last") or b"0") + 1
            record = b"%d %d %s" % (context.slot, context.time_ms, argument)
            context.state.put(b"record/%020d" % number, record)
            context.state.put(b"last", b"%d" % number)
            return b"%d" % number
        if verb == b"read" and argument.isdigit() and len(argument) <= NUMBER_DIGITS_MAX:
            found = context.state.get(b"record/%020d" % int(argument))
            if found is None:
                raise OperationError("no such record")
            return found
        raise OperationError("say: append <text>, or: read <number>")
