"""What a visitor who plays the faulty replica can do, as it stands in an address: a JSON list of moves.

{"do": "append", "kind": KIND, "view": V, "slot": S, "batch": B, "show": [R, …], "copy": 0 or 1}
                 KIND as in the log; view, slot and batch where the entry has them. B: "A" or "B" (that client's
                 request), "null", or "proposed" (what was proposed there). show: who is shown the entry at once.
                 copy 1: with a second copy of the log, or, where nothing is attested, as another message
{"do": "show", "show": [R, …]}      show these replicas the log up to its end
{"do": "wait", "ms": M}
{"do": "behave"}                    from now on do as a correct replica would, and show all to everybody
"""

import json
from dataclasses import dataclass
from typing import Final

MOVES_MAX: Final = 40
TEXT_MAX: Final = 6000
VIEW_MAX: Final = 9
SLOT_MAX: Final = 60
WAIT_MS_MAX: Final = 2000

# Which of view, slot and batch an entry has.
FIELDS: Final = {
    "PRE-PREPARE": ("view", "slot", "batch"),
    "PREPARE": ("view", "slot", "batch"),
    "COMMIT": ("view", "slot", "batch"),
    "CHECKPOINT": ("slot",),
    "SUSPECT": ("view",),
    "VIEW-CHANGE": ("view",),
    "NEW-VIEW": ("view",),
}
BATCHES: Final = ("A", "B", "null", "proposed")


@dataclass(frozen=True, slots=True)
class Move:
    """One move; see the module. kind and what follows: for "append" only."""

    do: str
    kind: str = ""
    view: int = 0
    slot: int = 0
    batch: str = ""
    show: tuple[int, ...] = ()
    copy: int = 0
    ms: int = 0

    def in_words(self) -> str:
        """Return what the visitor does."""
        whom = f"replica{'s' if len(self.show) > 1 else ''} {', '.join(map(str, self.show))}"
        if self.do == "wait":
            return f"you wait {self.ms} ms"
        if self.do == "behave":
            return "you do as a correct replica would from now on, and show everybody everything"
        if self.do == "show":
            return f"you show your log to {whom}" if self.show else "you show your log to nobody"
        values = {"view": f" v{self.view}", "slot": f" s{self.slot}", "batch": f" ({self.batch})"}
        said = self.kind + "".join(values[name] for name in FIELDS[self.kind])
        with_what = " with the second copy of your log" if self.copy else ""
        return f"you append {said}{with_what}, and show it to {whom if self.show else 'nobody'}"


def parse_moves(text: str, n: int, player: int) -> tuple[Move, ...]:
    """Read moves; ValueError says what is wrong with which."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"moves of {len(text)} characters, the limit is {TEXT_MAX}")
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the moves are no JSON: {error}") from error
    if not isinstance(found, list) or len(found) > MOVES_MAX:
        raise ValueError(f"the moves must be a list of {MOVES_MAX} at most")
    peers = tuple(number for number in range(n) if number != player)
    moves = []
    for place, item in enumerate(found, 1):
        try:
            moves.append(_move(item, peers))
        except ValueError as error:
            raise ValueError(f"move {place}: {error}") from error
    return tuple(moves)


def _move(item: object, peers: tuple[int, ...]) -> Move:
    if not isinstance(item, dict):
        raise ValueError("a move must be an object")  # noqa: TRY004 - all that is wrong with a text is a ValueError
    do = item.get("do")
    show = item.get("show", [])
    if not isinstance(show, list) or any(type(peer) is not int or peer not in peers for peer in show):
        raise ValueError(f"show must be a list of other replicas: {', '.join(map(str, peers))}")
    shown = tuple(sorted(set(show)))
    if do == "wait":
        return Move(do, ms=_number(item, "ms", 1, WAIT_MS_MAX))
    if do == "behave":
        return Move(do)
    if do == "show":
        return Move(do, show=shown)
    if do != "append":
        raise ValueError('do must be "append", "show", "wait" or "behave"')
    kind = item.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError(f"kind must be one of {', '.join(FIELDS)}")
    fields = FIELDS[kind]
    view = _number(item, "view", 0, VIEW_MAX) if "view" in fields else 0
    slot = _number(item, "slot", 1, SLOT_MAX) if "slot" in fields else 0
    batch = item.get("batch", "") if "batch" in fields else ""
    if "batch" in fields and batch not in BATCHES:
        raise ValueError(f"batch must be one of {', '.join(BATCHES)}")
    return Move("append", kind, view, slot, batch, shown, _number(item, "copy", 0, 1) if "copy" in item else 0)


def _number(item: dict[str, object], name: str, lowest: int, highest: int) -> int:
    value = item.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{name} must be a number from {lowest} to {highest}")
    return value
