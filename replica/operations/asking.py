"""Asking a replica what it says of itself, over the port that replicas and clients use.

A question is a TLS connection with the replica's pinned certificate, the challenge that it sends at once (its cluster's
id and its file's digest), a client's handshake with a key made for the occasion, and a StatusQuery. Each step that
fails has a name, because what the operator does next depends on it. Everything ends within the deadline.

`presented` is what a doctor tells somebody who has the wrong certificate: which one the other side has.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, cast

from replica.cluster.clusterfile import ClusterFile, ReplicaPlace
from replica.cluster.keys import ClientKey
from replica.operations.reports import read_report
from replica.wire.dial import UnknownNameError, dial, resolve
from replica.wire.frames import MessageProtocol
from replica.wire.handshake import connect_statement
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    WIRE_VERSION,
    Challenge,
    ClientHello,
    Message,
    Refused,
    StatusQuery,
    StatusReport,
    Welcome,
)
from replica.wire.tls import WrongCertificate, client_context, pinned, presented_certificate

DEADLINE_S: Final = 5.0
DEADLINE_S_MAX: Final = 600.0


class Outcome(Enum):
    """How far a question came."""

    ANSWERED = "answered"
    NO_NAME = "no-such-host"
    NOT_LISTENING = "not-listening"
    UNREACHABLE = "unreachable"
    SILENT = "silent"
    WRONG_CERTIFICATE = "wrong-certificate"
    WRONG_VERSION = "wrong-version"
    WRONG_CLUSTER = "wrong-cluster"
    WRONG_NUMBER = "wrong-number"
    REFUSED = "refused"
    BROKEN_OFF = "broken-off"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking one replica.

    problem: in words, empty if it answered. challenge: what it says of its cluster, if it came so far. presented: the
    certificate (DER) that it has, if that is another than the pinned one. report: its status. rtt_s: from the question
    to the answer. ahead_s: how far its wall clock is ahead of ours, right to rtt_s / 2.
    """

    place: ReplicaPlace
    outcome: Outcome
    problem: str = ""
    challenge: Challenge | None = None
    presented: bytes | None = None
    report: dict[str, Any] = field(default_factory=dict)
    rtt_s: float = 0.0
    ahead_s: float | None = None

    @property
    def number(self) -> int:
        """Return the number of the replica that was asked."""
        return self.place.number


async def ask(cluster: ClusterFile, place: ReplicaPlace, deadline_s: float = DEADLINE_S) -> Answer:
    """Ask one replica; never raises for what the other side or the network does."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Answer] = loop.create_future()
    conversation = _Conversation(cluster, place, done)
    ends = loop.time() + deadline_s
    try:
        addresses = await resolve(place.host, place.port, deadline_s)
        async with asyncio.timeout_at(ends):
            await dial(lambda: conversation, addresses, place.port, client_context(place.certificate_der))
            return await done
    except TimeoutError:
        step = "no connection" if conversation.challenge is None else "no status"
        text = f"{step} within {deadline_s:g} s"
        return Answer(place, Outcome.SILENT, text, conversation.challenge)
    except UnknownNameError as error:
        return Answer(place, Outcome.NO_NAME, error.why)
    except ConnectionRefusedError:
        return Answer(place, Outcome.NOT_LISTENING, f"nothing listens at {place.address}")
    except ssl.SSLCertVerificationError as error:
        shown = await presented_certificate(place.host, place.port, ends - loop.time())
        return Answer(place, Outcome.WRONG_CERTIFICATE, error.verify_message, presented=shown)
    except (OSError, ssl.SSLError) as error:
        return Answer(place, Outcome.UNREACHABLE, error.strerror or str(error) or type(error).__name__)
    finally:
        conversation.abort()


async def ask_all(cluster: ClusterFile, deadline_s: float = DEADLINE_S) -> list[Answer]:
    """Ask all replicas at once; the answers come in the order of their numbers."""
    return list(await asyncio.gather(*(ask(cluster, place, deadline_s) for place in cluster.replicas)))


class _Conversation(MessageProtocol):
    """The asking side; sets `done` as soon as it is known how far it came."""

    def __init__(self, cluster: ClusterFile, place: ReplicaPlace, done: "asyncio.Future[Answer]") -> None:
        super().__init__()
        self.challenge: Challenge | None = None
        self._cluster = cluster
        self._place = place
        self._done = done
        self._key = ClientKey.generate()
        self._asked_at = 0.0

    def opened(self) -> None:
        """Look at the certificate once more: the bytes count."""
        transport = cast("asyncio.Transport", self.transport)
        try:
            pinned(transport.get_extra_info("ssl_object"), self._place.certificate_der)
        except WrongCertificate as error:
            self._end(Outcome.WRONG_CERTIFICATE, str(error))

    def closed(self, reason: str) -> None:
        """Say that it ended too soon, if it did."""
        self._end(Outcome.BROKEN_OFF, f"the connection ended: {reason}")

    def message_received(self, message: Message) -> None:
        """Go through the handshake, ask, take the answer."""
        if isinstance(message, Challenge):
            self._on_challenge(message)
        elif isinstance(message, Welcome):
            self.frame_bytes_max = FRAME_BYTES_MAX
            self._asked_at = time.perf_counter()
            self.send(StatusQuery(1))
        elif isinstance(message, Refused):
            self._end(Outcome.REFUSED, f"refused ({message.code}): {message.text}")
        elif isinstance(message, StatusReport):
            self._on_report(message)

    def _on_challenge(self, challenge: Challenge) -> None:
        self.challenge = challenge
        mine = self._cluster.cluster_id
        if challenge.version != WIRE_VERSION:
            text = f"it speaks version {challenge.version} of the protocol, this program version {WIRE_VERSION}"
            self._end(Outcome.WRONG_VERSION, text)
        elif challenge.cluster_id != mine:
            text = f"it is of cluster {challenge.cluster_id.hex()}, this cluster.toml is of {mine.hex()}"
            self._end(Outcome.WRONG_CLUSTER, text)
        elif challenge.number != self._place.number:
            self._end(Outcome.WRONG_NUMBER, f"it says that it is replica {challenge.number}")
        else:
            signature = self._key.sign(connect_statement(challenge, self._place.certificate_der))
            self.send(ClientHello(WIRE_VERSION, mine, self._key.public_key, signature))

    def _on_report(self, message: StatusReport) -> None:
        now = time.time()
        rtt_s = time.perf_counter() - self._asked_at
        report = read_report(message.json)
        wall_ms = report.get("wall_ms")
        ahead_s = wall_ms / 1000 - (now - rtt_s / 2) if type(wall_ms) is int and abs(wall_ms) < 1 << 53 else None
        if not report:
            self._end(Outcome.BROKEN_OFF, "its status report is none")
            return
        answer = Answer(self._place, Outcome.ANSWERED, "", self.challenge, report=report, rtt_s=rtt_s, ahead_s=ahead_s)
        if not self._done.done():
            self._done.set_result(answer)

    def _end(self, outcome: Outcome, problem: str) -> None:
        if not self._done.done():
            self._done.set_result(Answer(self._place, outcome, problem, self.challenge))
