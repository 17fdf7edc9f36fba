"""The attested append-only log: the trusted computing base."""
