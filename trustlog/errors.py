"""The three ways the trusted log says no; callers treat each differently."""

from __future__ import annotations


class TrustLogError(Exception):
    """Base of every error that this package raises on purpose."""


class VerificationError(TrustLogError):
    """Bytes from outside do not prove what they claim: refuse and count them, change nothing.

    ``reason`` is a short stable code for programs (statistics, exit messages); the text is for people:

    ``malformed`` (length, version, range of a field), ``wrong-statement`` (another statement's domain tag),
    ``wrong-log``, ``wrong-kind`` (backend that the policy does not count), ``wrong-epoch``,
    ``wrong-context``, ``wrong-count`` (digests do not match the group's bounds), ``wrong-range`` (another
    index than asked), ``wrong-head`` (digests do not lead to the attested head), ``wrong-nonce``,
    ``bad-signature``; of receipts ``wrong-path``, ``wrong-payload``, ``wrong-cluster``, ``too-few``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SealedStateError(TrustLogError):
    """The state at rest is damaged: nothing may be signed with it. The text names file, offset and remedy."""


class MisuseError(TrustLogError):
    """The caller's own mistake; nothing was changed, and the text says what to do instead."""


class LogInUseError(MisuseError):
    """Another process has the log open."""
