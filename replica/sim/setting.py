"""What all nodes of one virtual world share."""

from dataclasses import dataclass, field

from replica.core.envelope import Envelope, decode_envelope
from replica.core.genesis import Genesis
from replica.sim.logs import Verifier
from replica.sim.witness import Witness
from replica.sim.world import Network, World

CLIENTS_FROM = 100
VILLAINS_FROM = 200
WALL_MS = 1_700_000_000_000


@dataclass(slots=True)
class Setting:
    """One run's world, cluster and witness.

    patience_ms: the replicas' first patience. append_ms_max: the longest that a durable append takes.
    clients: a client's public key -> its number as a node.
    """

    world: World
    network: Network
    genesis: Genesis
    verifier: Verifier
    witness: Witness
    patience_ms: int
    append_ms_max: int
    clients: dict[bytes, int] = field(default_factory=dict)

    @property
    def cluster_id(self) -> bytes:
        """The cluster's id."""
        return self.witness.cluster_id

    def decode(self, raw: bytes) -> Envelope:
        """Decode an envelope; LayoutError if it is none."""
        return decode_envelope(raw, self.cluster_id, self.genesis.limits)
