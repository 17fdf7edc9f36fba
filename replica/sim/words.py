"""Entries, groups and effects in words, for traces and transcripts."""

from replica.core import events
from replica.core.entries import (
    CHECKPOINT,
    COMMIT,
    NEW_VIEW,
    PRE_PREPARE,
    PREPARE,
    SUSPECT,
    VIEW_CHANGE,
)
from replica.core.group import VerifiedGroup

_NAMES = {
    PRE_PREPARE: "PRE-PREPARE",
    PREPARE: "PREPARE",
    COMMIT: "COMMIT",
    CHECKPOINT: "CHECKPOINT",
    SUSPECT: "SUSPECT",
    VIEW_CHANGE: "VIEW-CHANGE",
    NEW_VIEW: "NEW-VIEW",
}


def _number(payload: bytes, at: int) -> int:
    return int.from_bytes(payload[at : at + 8], "big")


def entry_in_words(payload: bytes) -> str:
    """Return an entry's name and numbers: "PREPARE v0 s7". Also for bytes that are no entry."""
    name = _NAMES.get(payload[0]) if payload else None
    if name is None:
        return f"{len(payload)} bytes"
    if payload[0] == CHECKPOINT:
        return f"{name} s{_number(payload, 1)}"
    if payload[0] in {PRE_PREPARE, PREPARE, COMMIT}:
        return f"{name} v{_number(payload, 1)} s{_number(payload, 9)}"
    if payload[0] == NEW_VIEW:
        count = int.from_bytes(payload[9:11], "big")
        named = (payload[11 + 10 * i : 21 + 10 * i] for i in range(min(count, 64)))
        refs = " ".join(f"{int.from_bytes(r[:2], 'big')}:{_number(r, 2)}" for r in named)
        return f"{name} v{_number(payload, 1)} names {refs}"
    return f"{name} v{_number(payload, 1)}"


def group_label(group: VerifiedGroup) -> str:
    """Return a group's place and a piece of its head: a few bytes that depend on all its content."""
    return f"log {group.author} {group.first}-{group.last} {group.head_after[:4].hex()}"


def effect_in_words(effect: events.Effect) -> str:
    """Return what a reader of a trace wants to know of an effect; empty if nothing."""
    if isinstance(effect, events.Append):
        return "says " + "; ".join(entry_in_words(payload) for payload in effect.payloads)
    if isinstance(effect, events.Executed):
        return f"executes slot {effect.slot} ({len(effect.batch.envelopes)} envelopes)"
    if isinstance(effect, events.Stable):
        return f"slot {effect.slot} is stable"
    if isinstance(effect, events.ViewOpened):
        return f"view {effect.view} is open, base {effect.base}, top {effect.top}"
    if isinstance(effect, events.Exposed):
        return f"exposes replica {effect.log} at {effect.index}: {effect.violation.rule}: {effect.violation.text}"
    if isinstance(effect, events.Lied):
        return f"replica {effect.log} lied at {effect.index}: {effect.text}"
    if isinstance(effect, events.Forked):
        return f"log {effect.log} is forked at {effect.index}"
    if isinstance(effect, events.Halt):
        return f"halts: {effect.reason}"
    return ""
