"""What all nodes of one virtual world share."""

from dataclasses import dataclass, field

from replica.core.entries import Entry
from replica.core.envelope import Envelope, decode_envelope
from replica.core.genesis import Genesis
from replica.sim.audience import Audience
from replica.sim.logs import Verifier
from replica.sim.witness import Witness
from replica.sim.world import Network, World

CLIENTS_FROM = 100
VILLAINS_FROM = 200
# Nodes of replicas that come in later; the first ones have their number for a node.
NEWCOMERS_FROM = 60
OPERATOR = 300
NOWHERE = 99  # where nobody is
WALL_MS = 1_700_000_000_000
# A cut that lags for so many first patiences is left for; shorter than in life, because runs are.
CUT_PATIENCES = 1


@dataclass(slots=True)
class Setting:
    """One run's world, cluster and witness.

    patience_ms: the replicas' first patience. append_ms_max: the longest that a durable append takes.
    milestone_intervals: how many checkpoints make a milestone. retained: entries kept in every log before a milestone's
    cut.
    clients: a client's public key -> its number as a node. audience: whoever follows the run.
    places: of logs that came in later, by public key, the node where each is.
    links: the chain of member lists so far, as the first replicas that went over made it.
    entries: what was decoded so far, by payload: one replica's entry is decoded once per run.
    """

    world: World
    network: Network
    genesis: Genesis
    verifier: Verifier
    witness: Witness
    patience_ms: int
    append_ms_max: int
    milestone_intervals: int
    retained: int
    clients: dict[bytes, int] = field(default_factory=dict)
    audience: Audience = field(default_factory=Audience)
    entries: dict[bytes, Entry] = field(default_factory=dict)
    real_signatures: bool = False
    links: list[bytes] = field(default_factory=list)
    places: dict[bytes, int] = field(default_factory=dict)
    _verifiers: dict[int, Verifier] = field(default_factory=dict)
    _envelopes: dict[bytes, Envelope] = field(default_factory=dict)

    @property
    def cluster_id(self) -> bytes:
        """The cluster's id."""
        return self.witness.cluster_id

    def verifier_of(self, genesis: Genesis) -> Verifier:
        """Return what verifies the logs of a list of members."""
        if not genesis.list_number:
            return self.verifier
        if genesis.list_number not in self._verifiers:
            self._verifiers[genesis.list_number] = Verifier(genesis, real=self.real_signatures)
        return self._verifiers[genesis.list_number]

    def decode(self, raw: bytes) -> Envelope:
        """Decode an envelope; LayoutError if it is none."""
        envelope = self._envelopes.get(raw)
        if envelope is None:
            envelope = self._envelopes[raw] = decode_envelope(raw, self.cluster_id, self.genesis.limits)
        return envelope
