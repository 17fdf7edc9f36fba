"""Operations that are in no envelope yet: a queue, bounded in pieces and in bytes."""

from collections import deque

from client.events import Ticket
from replica.core.layout import U64_MAX

NEVER = U64_MAX
LENGTH_SIZE = 4  # what an envelope spends on an operation besides its bytes


class WaitingQueue:
    """First in, first out, with a deadline for each.

    Invariant: `size` is the sum of the operations' bytes, and no deadline lies below `deadline`.
    """

    def __init__(self, operations_max: int, bytes_max: int) -> None:
        self.size = 0
        self.deadline = NEVER
        self._operations_max, self._bytes_max = operations_max, bytes_max
        self._queue: deque[tuple[Ticket, bytes, int]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, ticket: Ticket, operation: bytes, deadline: int) -> bool:
        """Take an operation; False if there is no room."""
        size = self.size + len(operation)
        if len(self._queue) >= self._operations_max or size > self._bytes_max:
            return False
        self._queue.append((ticket, operation, deadline))
        self.size = size
        self.deadline = min(self.deadline, deadline)
        return True

    def take(self, count_max: int, bytes_max: int) -> tuple[list[Ticket], list[bytes], list[int]]:
        """Remove what fits one envelope from the head: tickets, operations and deadlines."""
        queue = self._queue
        tickets: list[Ticket] = []
        operations: list[bytes] = []
        deadlines: list[int] = []
        left = bytes_max
        for _ in range(min(count_max, len(queue))):
            ticket, operation, deadline = queue[0]
            left -= LENGTH_SIZE + len(operation)
            if left < 0:
                break
            queue.popleft()
            self.size -= len(operation)
            tickets.append(ticket)
            operations.append(operation)
            deadlines.append(deadline)
        if not queue:
            self.deadline = NEVER
        return tickets, operations, deadlines

    def expire(self, now_ms: int) -> list[Ticket]:
        """Remove and return those whose deadline is over."""
        if now_ms < self.deadline:
            return []
        late = [ticket for ticket, _, deadline in self._queue if deadline <= now_ms]
        self._queue = deque([waiting for waiting in self._queue if waiting[2] > now_ms])
        self.size = sum([len(operation) for _, operation, _ in self._queue])
        self.deadline = min([deadline for _, _, deadline in self._queue], default=NEVER)
        return late

    def clear(self) -> list[Ticket]:
        """Remove and return all."""
        return self.expire(NEVER)

    def check(self) -> None:
        """Raise RuntimeError if the invariant does not hold."""
        size = sum([len(operation) for _, operation, _ in self._queue])
        earliest = min([deadline for _, _, deadline in self._queue], default=NEVER)
        if size != self.size or size > self._bytes_max or self.deadline > earliest:
            raise RuntimeError(f"{self.size} bytes counted, {size} waiting; deadline {self.deadline}")
