"""Which stage of a replica's work a sampled stack belongs to.

A line of what py-spy records, outermost call first, then how often it was seen:

    run_forever (uvloop/loop.pyx:1);_drain (replica/shell/node.py:371);handle (replica/core/machine.py:200) 17

The innermost frame that a rule names decides: hashing belongs to whoever verifies, stores or executes. What no rule names
is the event loop itself with its sockets and TLS, which are not Python and so have no frames of their own.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

READ = "read, decode"
VERIFY = "verify"
ORDER = "order"
ATTEST = "append, attest"
STORE = "store, fsync"
EXECUTE = "execute"
REPLY = "reply"
SEND = "send (TLS)"
KEEP = "checkpoints, state on disk"
WAKE = "hand over to threads and back"
LOOP = "event loop, sockets, TLS of what is read"
STAGES = (READ, VERIFY, ORDER, ATTEST, STORE, EXECUTE, REPLY, SEND, KEEP, WAKE, LOOP)

# The first rule that fits a frame decides: functions (all if none are named) of a file, or of all files in a folder.
RULES: tuple[tuple[str, str, frozenset[str]], ...] = tuple(
    (stage, path, frozenset(functions.split()))
    for stage, path, functions in (
        (WAKE, "concurrent/futures/", ""),
        (WAKE, "asyncio/futures.py", ""),
        (WAKE, "threading.py", "acquire notify wait"),
        (SEND, "replica/wire/frames.py", "send send_frame _flush"),
        (READ, "replica/wire/frames.py", ""),
        (READ, "replica/wire/messages.py", "decode_message"),
        (SEND, "replica/wire/messages.py", "encode_frame"),
        (READ, "replica/core/envelope.py", "decode_envelope"),
        (READ, "replica/core/group.py", "decode_group decode_payloads"),
        (REPLY, "replica/core/envelope.py", "encode_operations_reply encode_open_reply"),
        (REPLY, "replica/shell/replies.py", ""),
        (VERIFY, "replica/shell/verify.py", ""),
        (VERIFY, "trustlog/verification.py", ""),
        (KEEP, "replica/core/checkpoint.py", ""),
        (KEEP, "replica/core/checkpoints.py", ""),
        (KEEP, "replica/core/snapshot.py", ""),
        (KEEP, "replica/shell/keeper.py", ""),
        (KEEP, "replica/shell/statestore.py", ""),
        (KEEP, "replica/shell/statetree.py", ""),
        (STORE, "replica/shell/store.py", ""),
        (STORE, "replica/shell/sqlitefile.py", ""),
        (ATTEST, "replica/shell/processlog.py", ""),
        (ATTEST, "replica/shell/trustedlog.py", ""),
        (ATTEST, "replica/shell/outbox.py", ""),
        (ATTEST, "trustlog/service/", ""),
        (ATTEST, "trustlog/log.py", ""),
        (ATTEST, "trustlog/sealed.py", ""),
        (ATTEST, "trustlog/software.py", ""),
        (ATTEST, "trustlog/tpm/", ""),
        (SEND, "replica/shell/streams.py", ""),
        (EXECUTE, "replica/core/execution.py", ""),
        (EXECUTE, "replica/core/state.py", ""),
        (EXECUTE, "replica/core/sessions.py", ""),
        (EXECUTE, "replica/core/tree.py", ""),
        (EXECUTE, "replica/core/frozen.py", ""),
        (EXECUTE, "replica/shell/changes.py", ""),
        (EXECUTE, "replica/apps/", ""),
        (ORDER, "replica/core/", ""),
        (READ, "replica/shell/server.py", ""),
        (READ, "replica/shell/links.py", ""),
    )
)
_FRAME = re.compile(r"^(?P<function>.*) \((?P<path>[^()]*?)(?::\d+)?\)$")


@dataclass(frozen=True)
class Sample:
    """Frames, outermost first, and how often they were seen."""

    frames: tuple[str, ...]
    count: int


def parse(lines: Iterable[str]) -> list[Sample]:
    """Read what py-spy recorded; ValueError names a line that is none of it."""
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        stack, space, count = line.rstrip("\n").rpartition(" ")
        if not space or not count.isdigit():
            raise ValueError(f"line {number} is no stack and count: {line[:100]!r}")
        if stack:  # an empty one changed while it was read
            samples.append(Sample(tuple(stack.split(";")), int(count)))
    return samples


def stage_of(frames: Iterable[str]) -> str:
    """Return the stage of a stack."""
    for frame in reversed(tuple(frames)):
        found = _FRAME.match(frame)
        if found is None:
            continue
        for stage, path, functions in RULES:
            if within(found["path"], path) and (not functions or found["function"].rpartition(".")[2] in functions):
                return stage
    return LOOP


def within(path: str, place: str) -> bool:
    """Say whether a file, named from any folder on, is `place` or, if that ends with a slash, lies in it."""
    at = f"/{path}".rfind(f"/{place}")
    return at >= 0 and (place.endswith("/") or at + len(place) == len(path))


def shares(samples: Iterable[Sample]) -> dict[str, float]:
    """Return every stage's share of all samples; they add up to 1. ValueError without any."""
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[stage_of(sample.frames)] += sample.count
    total = counts.total()
    if not total:
        raise ValueError("nothing was sampled: the process did nothing, or could not be read")
    return {stage: counts[stage] / total for stage in STAGES}


def hottest(samples: Iterable[Sample], most: int) -> list[tuple[str, float]]:
    """Return the functions in which most time was spent themselves, and their shares; lines of one function together."""
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[re.sub(r":\d+\)$", ")", sample.frames[-1])] += sample.count
    total = max(1, counts.total())
    return [(function, count / total) for function, count in counts.most_common(most)]
