"""Whatever a host does with its TPM, all who replay the log from what is pinned read one history.

A TPM in miniature: one PCR, the two counts, a key that signs quotes. A random attacker says groups at any index with any
claim about what stood before, CLOSE and OPEN of any epoch, extends by something else, reboots, restarts, resumes. Of all
that verifies, no head that can be reached from the beginning may have two successors.
"""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trustlog.support import CONTEXT, digests_of, fixed_key
from tests.trustlog.tpm.support import SIGNER, forged_quote, public_of, sign
from trustlog import (
    AppendStatement,
    Attestation,
    BackendKind,
    LogIdentity,
    VerificationError,
    VerifyingKey,
    entry_digest,
    heads_of,
    initial_head,
    verify_append,
)
from trustlog.statements import open_payload
from trustlog.tpm import chain
from trustlog.tpm.chain import CLOSE_DIGEST, TpmPins

KEY = fixed_key(5)
BASE = bytes(range(32))
PINS = TpmPins(14, BASE, SIGNER, 3 << 32)
IDENTITY = LogIdentity(VerifyingKey.from_bytes(public_of(KEY)), BackendKind.TPM, PINS.epoch, PINS)


class Attacker:
    """The TPM and everything that its host has ever seen of it."""

    def __init__(self, chance):
        self.chance = chance
        self.resets, self.restarts = 3, 0
        self.pcr = BASE
        self.values = [BASE]  # what the PCR ever was
        self.epochs = [PINS.epoch]
        self.closed = []  # values of the PCR after a CLOSE, and their epochs
        self.links = defaultdict(set)
        self.opened = 0

    @property
    def epoch(self):
        return self.resets << 32 | self.restarts

    def reboot(self):
        self.resets, self.restarts, self.pcr = self.resets + 1, 0, BASE
        self.epochs.append(self.epoch)

    def restart(self):
        self.restarts, self.pcr = self.restarts + 1, BASE
        self.epochs.append(self.epoch)

    def resume(self):
        self.restarts += 1
        self.epochs.append(self.epoch)

    def extend(self):
        self._extend(bytes([self.chance.randrange(3)]) * 32)

    def say(self):
        self._say(self.chance.randint(1, 4), digests_of(self.chance.choice("ab")))

    def close(self):
        self._say(self.chance.randint(1, 4), [CLOSE_DIGEST])
        self.closed.append((self.pcr, self.epoch))

    def open(self):
        """Say OPEN, most often after something that was closed; else after any value in any epoch."""
        stood, epoch = self.chance.choice(self.values), self.chance.choice(self.epochs)
        if self.closed and self.chance.random() < 0.8:
            stood, epoch = self.chance.choice(self.closed)
        last = self.chance.randint(1, 4)
        self._say(last + 1, [entry_digest(open_payload(last, chain.head(epoch, stood, closed=True)))], stood)

    def honest(self):
        """Go on as the backend would, so that long histories are reached."""
        self._say(self.chance.randint(1, 3), digests_of("c"), self.pcr)

    def _extend(self, event):
        self.pcr = chain.extended(self.pcr, event)
        self.values.append(self.pcr)

    def _say(self, first, digests, claimed=None):
        before = claimed or (self.pcr if self.chance.random() < 0.8 else self.chance.choice(self.values))
        self._extend(chain.event_digest(IDENTITY.key.log_id, first, CONTEXT, digests))
        header = (BackendKind.TPM, CONTEXT, IDENTITY.key.log_id, self.epoch)
        statement = AppendStatement(*header, first, first + len(digests) - 1, before, self.pcr).encode()
        attest = forged_quote({14: self.pcr}, chain.asked(statement), resets=self.resets, restarts=self.restarts)
        try:
            said = verify_append(IDENTITY, Attestation(statement, attest + sign(KEY, attest)), digests, context=CONTEXT)
        except VerificationError:
            return
        link = heads_of(IDENTITY, said, digests)
        self.opened += link[0] == chain.head(PINS.before(self.epoch), before, closed=True)
        self.links[link[0]].add(link[1])

    def forked(self):
        """A head that a reader can reach and that has two successors; None if there is none."""
        head, seen = initial_head(IDENTITY), set()
        while head not in seen and self.links[head]:
            seen.add(head)
            if len(self.links[head]) > 1:
                return head
            (head,) = self.links[head]
        return None


ACTIONS = ["say", "close", "open", "open", "honest", "extend", "reboot", "reboot", "restart", "resume"]


def attack(seed, steps=40):
    attacker = Attacker(random.Random(seed))
    for _ in range(steps):
        getattr(attacker, attacker.chance.choice(ACTIONS))()
    return attacker


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_no_attacker_gives_a_reachable_head_two_successors(seed):
    assert attack(seed).forked() is None


def test_the_attackers_reach_what_matters():
    """Epochs that really continue each other; otherwise the search above would show nothing."""
    assert sum(attack(seed).opened for seed in range(60)) > 10


@pytest.mark.parametrize("broken", ["any epoch counts", "a base forgotten", "an open that names no epoch"])
def test_the_search_finds_what_a_missing_rule_would_allow(monkeypatch, broken):
    if broken == "any epoch counts":
        monkeypatch.setattr(TpmPins, "accepts", lambda *_: True)
        monkeypatch.setattr(TpmPins, "before", lambda self, _: self.epoch)
    elif broken == "a base forgotten":
        real = chain.head
        monkeypatch.setattr(chain, "head", lambda epoch, pcr, closed=False: real(0, pcr, closed=closed))
    else:
        monkeypatch.setattr(chain, "head", lambda epoch, pcr, closed=False: bytes([closed]) + pcr[1:])
    assert any(attack(seed).forked() is not None for seed in range(300))
