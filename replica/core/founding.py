"""Founding a cluster with the state of another one, of which more replicas are lost than it can do without.

The other cluster cannot go on: nobody may speak for the logs that are lost. So its state becomes what a new cluster
begins with, which has another id and other logs. The new genesis names that state by its digests, and where it comes
from (`replica.core.genesis.Founding`); they stand in its cluster id, so replicas that begin with different states never
talk to each other, and one without it has it from any that does, like the state after a checkpoint.

    application's state   as it is, every key
    client table          who may be a client (`replica.core.clients`), and which version of the application is in
                          force (`replica.core.versions`), nothing else: sessions end, and so does the other cluster's
                          chain of member lists
    version in force      is so from the new cluster's first slot on. One that was commanded is in force after its slot,
                          so at a slot's end none is on its way: it was executed, or it is lost with what came after
    slots                 go on: the new cluster's first is the one after the next multiple of K, so that no application
                          sees a slot twice. Those between are never used
    agreed time           goes on

Sessions end, so what a client had under way has an unknown outcome: it may have been executed, and nothing here knows
it if it is sent again.
"""

from replica.core.checkpoint import Header, founding_header
from replica.core.execution import Executor
from replica.core.frozen import FrozenMap
from replica.core.genesis import Founding, Genesis
from replica.core.layout import LayoutError
from replica.core.logstate import initial_states
from replica.core.sessions import CLIENTS_RECORDS, VERSIONS_RECORDS
from replica.core.snapshot import Fetched
from replica.core.state import BucketedMap


def carried_over(executor: Executor) -> BucketedMap:
    """Return the client table with which a cluster begins that is founded with what `executor` has come to."""
    kept = (CLIENTS_RECORDS, VERSIONS_RECORDS)
    return BucketedMap(record for prefix in kept for record in executor.table.records.scan(prefix))


def founding_of(cluster_id: bytes, executor: Executor, table: BucketedMap) -> Founding:
    """Return what a new genesis says of the state that `executor` has come to in the cluster `cluster_id`."""
    application, _ = executor.roots()
    return Founding(cluster_id, executor.slot, executor.digest(), executor.time_ms, application, table.root())


def founding_state(genesis: Genesis, application: FrozenMap, table: FrozenMap) -> Fetched:
    """Return the state with which the cluster of `genesis` begins; LayoutError if these maps are not what it names."""
    header = founding_header(genesis)
    if header is None:
        raise LayoutError("this cluster was not founded with another one's state, or has other members by now")
    check_maps(header, application.root(), table.root())
    return Fetched(header, b"", tuple(initial_states(genesis.n, genesis.base)), (), application, table)


def check_maps(header: Header, application: bytes, table: bytes) -> None:
    """Raise LayoutError unless maps with these roots are those of `header`."""
    for name, root, wanted in (
        ("application's state", application, header.application),
        ("client table", table, header.table),
    ):
        if root != wanted:
            raise LayoutError(f"the {name} has the digest {root.hex()}, and {wanted.hex()} belongs there")
