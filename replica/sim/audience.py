"""Somebody who follows a run without being part of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replica.core.batch import Batch
from replica.core.events import Effect
from replica.core.group import VerifiedGroup
from replica.core.logstate import Opening


@dataclass(frozen=True, slots=True, order=True)
class Vote:
    """A replica's vote for a batch in an earlier view; the primary's is its proposal."""

    view: int
    author: int
    digest: bytes


class Audience:
    """Hears what happens on the stage; this one forgets it. What an audience does must change nothing there."""

    def said(self, group: VerifiedGroup) -> None:
        """Take in that a replica, faulty or not, has attested a group of its log; who is shown it is another matter."""

    def effect(self, replica: int, effect: Effect) -> None:
        """Take in what a replica's core asks for; a faulty replica may do something else."""

    def opened(
        self,
        replica: int,
        view: int,
        opening: Opening,
        carried: Mapping[int, Batch],
        votes: Mapping[int, Sequence[Vote]],
    ) -> None:
        """Take in that a replica read a NEW-VIEW.

        carried: slot -> what is proposed again for it. votes: slot -> who voted for what before, as far as was read.
        """

    def asked(self, client: int, operation: bytes) -> None:
        """Take in that a correct client begins an operation."""

    def sent(self, client: int, replicas: Sequence[int], envelope: bytes) -> None:
        """Take in that a correct client sends an envelope, for the first time or again."""

    def answered(self, client: int, operation: bytes, slot: int) -> None:
        """Take in that a correct client accepted a result."""

    def failed(self, client: int, operation: bytes, reason: str) -> None:
        """Take in that a correct client gave an operation up."""
