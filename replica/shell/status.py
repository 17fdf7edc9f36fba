"""What a replica says of itself: its own word, for people; nothing that anyone should rest a decision on."""

import json
import os
import time
from typing import TYPE_CHECKING, Any

from replica.shell.trustedlog import details, protects, trouble
from trustlog import __version__

if TYPE_CHECKING:
    from replica.shell.node import Node


def report(node: "Node") -> bytes:
    """Return the status as a JSON object in UTF-8."""
    core, log, genesis = node.core, node.trusted_log, node.home.cluster.genesis
    own = node.number
    content: dict[str, Any] = {
        "replica": own,
        "version": __version__,
        "pid": os.getpid(),
        "wall_ms": int(time.time() * 1000),
        "uptime_s": round(time.monotonic() - node.started, 3),
        "cluster_id": node.home.cluster.cluster_id.hex(),
        "cluster_file": node.home.cluster.digest.hex(),
        "ordering": genesis.ordering.label,
        "application": genesis.application,
        "application_version": {
            "in_force": core.executor.versions.present,
            "after": core.executor.versions.after,
            "known": core.executor.knows_version,
        },
        "durability": node.home.settings.durability,
        "payloads_at_rest": "sealed" if node.seal.mark else "clear",
        "view": core.view,
        "primary": core.primary,
        "view_open": core.is_open,
        "suspects_primary": core.suspects,
        "patience_ms": core.patience.present_ms,
        "executed": core.executed,
        "stable": core.stable,
        "persisted": node.keeper.slot,
        "cut": core.cut,
        "members": {
            "list": genesis.list_number,
            "ends": core.ends,
            "is_member": node.lists.is_member,
            "no_member_since": node.lists.left_with,
        },
        "mute": node.why_mute,
        "halted": core.halted,
        "not_ready": node.readiness.problem(),
        "transfer": None if core.transfer is None else core.transfer.slot,
        "operations": core.executor.operations,
        "keys": len(core.executor.state),
        "sessions": len(core.executor.table),
        "client_keys": {
            "mode": core.executor.clients.mode.label,
            "commands": core.executor.clients.number,
            "listed": len(core.executor.clients),
        },
        "log": {
            "backend": log.kind.name.lower(),
            "protects": protects(log),
            "trouble": trouble(log),
            "service": details(log),
            "last": log.last,
            "head": log.head.hex(),
            "public_key": log.public_key.hex(),
        },
        "peers": [_peer(node, number) for number in range(genesis.n) if number != own],
        "latency_ms": {
            "fsync": node.measures.fsync_s.recent_ms(),
            "attest": node.measures.attest_s.recent_ms(),
            "client": node.measures.client_s.recent_ms(),
        },
        "loop": {"longest_turn_ms": round(node.ticking.longest_turn_ms, 1)},
        "clients": node.server.client_count,
        "watches": len(node.watches),
        "changes_kept_from": node.watches.history.floor,
        "verdicts": [node.detector.report(number) for number in range(genesis.n)],
        "evidence": node.detector.keeper.names,
        "requests_waiting": core.requests_waiting,
        "refused": dict(sorted((node.refusals + core.refusals).items())),
    }
    return json.dumps(content).encode()


def _peer(node: "Node", number: int) -> dict[str, Any]:
    core, link = node.core, node.links[number]
    exposed = core.exposed.get(number)
    return {
        "replica": number,
        "address": link.place.address,
        "connected": link.is_up,
        "trouble": None if link.is_up else link.trouble,
        "cluster_file": None if link.cluster_file is None else link.cluster_file.hex(),
        "appraisal": node.appraisals.report(number),
        "received": core.received(number),
        "read": core.read(number),
        "head": core.head(number).hex(),
        "waiting_for": core.waiting_for(number),
        "exposed": None if exposed is None else f"{exposed.rule}: {exposed.text}",
    }
