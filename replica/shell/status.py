"""What a replica says of itself: its own word, for people; nothing that anyone should rest a decision on."""

import json
import os
import time
from typing import TYPE_CHECKING, Any

from trustlog import BackendKind

if TYPE_CHECKING:
    from replica.shell.node import Node

# What each backend protects against, in a word for a table.
PROTECTS = {
    BackendKind.SOFTWARE: "in process: not against this host's own program",
    BackendKind.PROCESS: "own process: against a compromised replica program",
    BackendKind.TPM: "TPM 2.0: against a compromised root and a rolled back disk",
}


def report(node: "Node") -> bytes:
    """Return the status as a JSON object in UTF-8."""
    core, log, genesis = node.core, node.trusted_log, node.home.cluster.genesis
    own = node.number
    content: dict[str, Any] = {
        "replica": own,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - node.started, 3),
        "cluster_id": node.home.cluster.cluster_id.hex(),
        "cluster_file": node.home.cluster.digest.hex(),
        "ordering": genesis.ordering.label,
        "application": genesis.application,
        "durability": node.home.settings.durability,
        "view": core.view,
        "primary": core.primary,
        "view_open": core.is_open,
        "suspects_primary": core.suspects,
        "patience_ms": core.patience.present_ms,
        "executed": core.executed,
        "stable": core.stable,
        "operations": core.executor.operations,
        "keys": len(core.executor.state),
        "sessions": len(core.executor.table),
        "log": {
            "backend": log.kind.name.lower(),
            "protects": PROTECTS[log.kind],
            "last": log.last,
            "head": log.head.hex(),
            "public_key": log.public_key.hex(),
        },
        "peers": [_peer(node, number) for number in range(genesis.n) if number != own],
        "clients": node.server.client_count,
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
        "received": core.received(number),
        "read": core.read(number),
        "head": core.head(number).hex(),
        "waiting_for": core.waiting_for(number),
        "exposed": None if exposed is None else f"{exposed.rule}: {exposed.text}",
    }
