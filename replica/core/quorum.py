"""Quorum arithmetic, once.

n = 2f + 1 replicas, of which f may be faulty; a quorum is q = f + 1.

Two quorums have 2q - n = 1 replica in common, and that one may be faulty. In PBFT this would be fatal: a
quorum intersection there holds f + 1 replicas, hence a correct one. Here the *log* of the common replica comes to
the rescue: it is attested and read in order, so it cannot say one thing to one quorum and another to the other, nor
hide what it said (A2M, Chun et al., SOSP 2007, section 4; MinBFT, Veronese et al., 2013, section 4.2).

q = f + 1 replicas also hold at least one correct one, which is why f + 1 equal replies satisfy a client and f + 1
wishes move the view; and n - f = q correct replicas always exist, so waiting for q is never waiting for a faulty one.
"""

FAULTS_MAX = 10


def replica_count(f: int) -> int:
    """Return n = 2f + 1, the number of replicas that survives f faulty ones."""
    if not 1 <= f <= FAULTS_MAX:
        raise ValueError(f"f must be from 1 to {FAULTS_MAX}, not {f}")
    return 2 * f + 1


def faults(n: int) -> int:
    """Return f of a cluster of n replicas; ValueError if n is not 2f + 1 for an f that is possible."""
    if n % 2 == 0 or not 1 <= n // 2 <= FAULTS_MAX:
        raise ValueError(f"a cluster has 2f + 1 replicas, 3 to {2 * FAULTS_MAX + 1}, not {n}")
    return n // 2


def quorum(f: int) -> int:
    """Return q = f + 1."""
    return f + 1


def primary(view: int, n: int) -> int:
    """Return the number of the replica that proposes in `view`."""
    return view % n


def is_quorum(voters: int, f: int) -> bool:
    """Say whether `voters`, a bit mask of replica numbers, holds at least q distinct replicas."""
    return voters.bit_count() > f
