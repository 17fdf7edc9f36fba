"""An attested append-only log (A2M, SOSP 2007): the small part of a replica that must not lie.

``create``, ``open_log`` and ``in_memory`` make an ``AttestedLog``; ``verify_append``, ``verify_lookup``,
``verify_end`` and ``verify_truncate`` check what one said, with nothing but its public key. The README of
this package says what may be concluded from it, and what each backend withstands.
"""

from trustlog.errors import MisuseError, SealedStateError, TrustLogError, VerificationError
from trustlog.hashing import HASH_SIZE, chain, entry_digest, fold, genesis_head, log_id
from trustlog.log import AttestedLog, Group, LogState, StateStore
from trustlog.software import create, in_memory, open_log
from trustlog.statements import (
    APPEND_SIZE,
    CONTEXT_SIZE,
    END_SIZE,
    LOOKUP_SIZE,
    NONCE_SIZE,
    TRUNCATE_SIZE,
    AppendStatement,
    BackendKind,
    EndStatement,
    LookupStatement,
    Outcome,
    TruncateStatement,
)
from trustlog.verification import (
    GROUP_ENTRIES_MAX,
    PUBLIC_KEY_SIZE,
    SIGNATURE_SIZE,
    Attestation,
    LogIdentity,
    VerifyingKey,
    find_contradiction,
    verify_append,
    verify_end,
    verify_lookup,
    verify_signature,
    verify_truncate,
)

__version__ = "0.1.0"

__all__ = [
    "APPEND_SIZE",
    "CONTEXT_SIZE",
    "END_SIZE",
    "GROUP_ENTRIES_MAX",
    "HASH_SIZE",
    "LOOKUP_SIZE",
    "NONCE_SIZE",
    "PUBLIC_KEY_SIZE",
    "SIGNATURE_SIZE",
    "TRUNCATE_SIZE",
    "AppendStatement",
    "Attestation",
    "AttestedLog",
    "BackendKind",
    "EndStatement",
    "Group",
    "LogIdentity",
    "LogState",
    "LookupStatement",
    "MisuseError",
    "Outcome",
    "SealedStateError",
    "StateStore",
    "TruncateStatement",
    "TrustLogError",
    "VerificationError",
    "VerifyingKey",
    "chain",
    "create",
    "entry_digest",
    "find_contradiction",
    "fold",
    "genesis_head",
    "in_memory",
    "log_id",
    "open_log",
    "verify_append",
    "verify_end",
    "verify_lookup",
    "verify_signature",
    "verify_truncate",
]
