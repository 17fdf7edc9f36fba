"""The layouts of protocol.py, byte by byte, and requests that are none: nothing advances, nothing dies."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trustlog.service.support import KEY, Forgetful, process_log, serve_in_thread
from tests.trustlog.support import CONTEXT, NONCE, digests_of, fixed_key, identity_of
from trustlog import (
    Attestation,
    BackendKind,
    LogState,
    MisuseError,
    VerificationError,
    verify_append,
    verify_end,
)
from trustlog.service import protocol
from trustlog.service.client import RemoteLog, ServiceLostError, ServicePeerError, ServiceRefusedError
from trustlog.service.protocol import Protection, ProtocolError, Welcome, Why
from trustlog.service.server import PATIENCE_S, Answering, Server, StorageError
from trustlog.statements import U64_MAX

GROUP = (Attestation(b"s" * 170, b"g" * 64), [b"1" * 32, b"2" * 32])


def u64(number):
    return number.to_bytes(8, "big")


def test_every_request_as_the_module_lays_it_out():
    assert protocol.encode_hello(NONCE, CONTEXT) == b"\x01\x01" + NONCE + CONTEXT
    assert (
        protocol.encode_append(7, [b"a" * 32, b"b" * 32], CONTEXT) == b"\x02" + u64(7) + CONTEXT + b"a" * 32 + b"b" * 32
    )
    lookup = b"\x04" + u64(9) + NONCE + CONTEXT
    assert protocol.encode_lookup(9, NONCE, CONTEXT, None) == lookup
    whole = lookup + b"s" * 170 + b"g" * 64 + b"1" * 32 + b"2" * 32
    assert protocol.encode_lookup(9, NONCE, CONTEXT, GROUP) == whole
    assert (whole.index(b"s" * 170), whole.index(b"g" * 64), whole.index(b"1" * 32)) == (73, 243, 307)
    assert protocol.encode_end(NONCE, CONTEXT) == b"\x05" + NONCE + CONTEXT
    assert protocol.encode_truncate(3, CONTEXT) == b"\x06" + u64(3) + CONTEXT
    assert protocol.frame(b"abc") == b"\0\0\0\x03abc"


def test_every_reply_as_the_module_lays_it_out():
    end = Attestation(b"e" * 170, b"g" * 64)
    raw = Welcome(2, True, Protection(5), 1, 2, 3, 4, b"k" * 65, end).encode()
    assert (
        raw == bytes((1, 1, 2, 1, 5, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3)) + u64(4) + b"k" * 65 + b"e" * 170 + b"g" * 64
    )
    assert len(raw) == 324
    assert Welcome.decode(raw) == Welcome(2, True, Protection(5), 1, 2, 3, 4, b"k" * 65, end)
    refusal = protocol.encode_refusal(Why.VERIFICATION, "né", "wrong-log")
    assert refusal == b"\x02\x02" + b"wrong-log".ljust(24, b"\0") + "né".encode()
    assert protocol.decode_refusal(refusal) == (Why.VERIFICATION, "wrong-log", "né")
    assert len(protocol.encode_refusal(Why.MISUSE, "x" * 5000)) == protocol.REPLY_SIZE_MAX


def test_the_sizes_in_the_module_and_the_page():
    page = protocol.__doc__
    assert f"73 … {len(protocol.encode_append(1, [bytes(32)] * 1024, CONTEXT)):,}" in page
    assert f"73 … {protocol.REQUEST_SIZE_MAX:,}" in page
    for code in (*protocol.Request, *protocol.Reply):
        assert f"    {code.name:<8}  {code.value}   " in page


def answering(store=None):
    log = process_log(fixed_key(), store)
    log.append(digests_of("1", "2"), context=CONTEXT)
    return log, Answering(log, Protection(0), KEY)


def answer_or_refusal(service, request):
    try:
        return service.answer(request)
    except ProtocolError:
        return None


GOOD = [
    protocol.encode_append(3, digests_of("3"), CONTEXT),
    protocol.encode_lookup(1, NONCE, CONTEXT, None),
    protocol.encode_lookup(1, NONCE, CONTEXT, GROUP),
    protocol.encode_end(NONCE, CONTEXT),
    protocol.encode_truncate(2, CONTEXT),
    b"\x03",
    b"\x07",
]


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=700),
        st.builds(lambda raw, cut: raw[:cut], st.sampled_from(GOOD), st.integers(0, 400)),
        st.builds(lambda raw, more: raw + more, st.sampled_from(GOOD), st.binary(min_size=1, max_size=70)),
        st.builds(
            lambda raw, at, value: raw[: at % len(raw)] + bytes([value]) + raw[at % len(raw) + 1 :],
            st.sampled_from(GOOD),
            st.integers(0, 400),
            st.integers(0, 255),
        ),
    )
)
def test_whatever_is_sent_is_a_request_or_changes_nothing(request_bytes):
    log, service = answering()
    before = log._state
    reply = answer_or_refusal(service, request_bytes)
    if reply is None or reply[0] != protocol.Reply.ATTESTED:
        assert log._state == before
    elif log._state.last != before.last:
        # Only a whole append at the right index advances the log, and by exactly its digests.
        assert request_bytes[:9] == b"\x02" + u64(3)
        digests = protocol.split(request_bytes[41:])
        attestation = Attestation(reply[1:-64], reply[-64:])
        verify_append(identity_of(log), attestation, digests, context=request_bytes[9:41])
    assert log._state.last in {2, 2 + max(0, len(request_bytes) - 41) // 32}


def test_an_append_sent_twice_is_appended_once():
    log, service = answering()
    request = protocol.encode_append(3, digests_of("3"), CONTEXT)
    assert service.answer(request)[0] == protocol.Reply.ATTESTED
    why, _, text = protocol.decode_refusal(service.answer(request))
    assert (why, log.last) == (Why.MISUSE, 3)
    assert "next index is 4" in text
    assert service.refused == {"misuse": 1}


@pytest.mark.parametrize("first", [0, 2, 4, 2**64 - 1])
def test_an_append_at_another_index_is_refused(first):
    log, service = answering()
    reply = service.answer(protocol.encode_append(first, digests_of("3"), CONTEXT))
    assert protocol.decode_refusal(reply)[0] is Why.MISUSE
    assert log.last == 2


def test_a_failed_save_ends_the_service():
    store = Forgetful()
    log, service = answering(store)
    store.error = OSError(28, "No space left on device")
    with pytest.raises(StorageError, match="No space left"):
        service.answer(protocol.encode_append(3, digests_of("3"), CONTEXT))
    assert log.last == 2


def test_the_client_learns_why_the_service_ended():
    store = Forgetful()
    remote = serve_in_thread(process_log(fixed_key(), store))
    store.error = OSError(28, "No space left on device")
    with remote:
        with pytest.raises(ServiceLostError, match="No space left"):
            remote.append(digests_of("1"), context=CONTEXT)
        with pytest.raises(ServiceLostError):
            remote.append(digests_of("1"), context=CONTEXT)
        assert remote.last == 0


def test_the_key_for_payloads_is_the_services():
    with serve_in_thread(process_log(fixed_key())) as remote:
        assert remote.store_key() == KEY
    own, its = socket.socketpair()
    thread = threading.Thread(
        target=lambda: Server(
            Answering(process_log(fixed_key()), Protection(0)), os.getuid(), lambda _: None
        ).serve_one(its)
    )
    thread.start()
    with RemoteLog(own) as remote, pytest.raises(MisuseError, match="keeps no key"):
        remote.store_key()
    thread.join()


def fake_service(*replies):
    """A connection to something that answers each request with the next of `replies`, and then hangs up."""
    own, its = socket.socketpair()

    def serve():
        with its:
            for reply in replies:
                size = int.from_bytes(its.recv(4), "big")
                request = its.recv(size, socket.MSG_WAITALL)
                its.sendall(reply(request) if callable(reply) else reply)

    thread = threading.Thread(target=serve)
    thread.start()
    return own, thread


def genuine(request):
    return protocol.frame(Answering(process_log(fixed_key()), Protection(0)).welcome(request, 0))


def replayed(_request):
    return genuine(protocol.encode_hello(bytes(32), CONTEXT))


def altered(at):
    def reply(request):
        raw = bytearray(genuine(request))
        raw[at] ^= 1
        return bytes(raw)

    return reply


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", ServiceLostError),
        (b"\0\0\0\0", ServiceLostError),
        (b"\xff\xff\xff\xff", ServiceLostError),
        (protocol.frame(b"\x00" + bytes(234)), ProtocolError),
        (protocol.frame(b"\x01" + bytes(323)), ProtocolError),
        (protocol.frame(b"\x02\x63"), ProtocolError),
        (protocol.frame(protocol.encode_refusal(Why.PEER, "not you")), ServicePeerError),
        (replayed, VerificationError),
        (altered(4 + 90 + 20), VerificationError),  # its context
        (altered(4 + 260 + 5), VerificationError),  # its signature
        (altered(4 + 2), VerificationError),  # its kind
        (altered(4 + 40), ServiceRefusedError),  # its key
    ],
)
def test_a_greeting_that_proves_nothing_is_refused(reply, error):
    own, thread = fake_service(reply)
    with pytest.raises(error):
        RemoteLog(own, public_key=process_log(fixed_key()).public_key)
    assert own.fileno() == -1
    thread.join()


def test_another_logs_service_is_refused_by_name():
    own, thread = fake_service(genuine)
    with pytest.raises(ServiceRefusedError, match="another log's"):
        RemoteLog(own, public_key=process_log(fixed_key(2)).public_key)
    thread.join()


def test_an_attestation_of_something_else_is_not_taken():
    """A service that attests another group than it was given is dropped, and nothing is counted as said."""
    log = process_log(fixed_key())

    def other(_request):
        attestation = log.append(digests_of("something else"), context=CONTEXT)
        return protocol.frame(b"\x00" + attestation.statement + attestation.signature)

    own, thread = fake_service(genuine, other)
    with RemoteLog(own) as remote:
        with pytest.raises(ServiceLostError, match="another group"):
            remote.append(digests_of("1"), context=CONTEXT)
        assert remote.last == 0
        with pytest.raises(ServiceLostError):
            remote.end(nonce=NONCE, context=CONTEXT)
    thread.join()


def test_a_service_that_does_not_answer_is_given_up():
    own, its = socket.socketpair()
    with its, pytest.raises(ServiceLostError, match=r"within 0\.05 s"):
        RemoteLog(own, reply_s=0.05)


def test_a_lookup_whose_group_has_no_place_in_the_layout_is_refused_here():
    with serve_in_thread(process_log(fixed_key())) as remote:
        digests = digests_of("1")
        attestation = remote.append(digests, context=CONTEXT)
        for group, reason in (
            ((Attestation(attestation.statement, attestation.signature[:-1]), digests), "bad-signature"),
            ((attestation, [digests[0][:-1]]), "wrong-count"),
            ((Attestation(attestation.statement[:-1], attestation.signature), digests), "malformed"),
        ):
            with pytest.raises(VerificationError) as caught:
                remote.lookup(1, nonce=NONCE, context=CONTEXT, group=group)
            assert caught.value.reason == reason
        verify_end(identity_of(remote), remote.end(nonce=NONCE, context=CONTEXT), context=CONTEXT, nonce=NONCE)
        assert remote.kind is BackendKind.PROCESS
    with pytest.raises(MisuseError, match="closed"):
        remote.reissue()
    assert PATIENCE_S > 0


def test_replies_that_do_not_fit_their_request_end_the_connection():
    for reply, verb in (
        (protocol.frame(b"\x03" + bytes(32)), RemoteLog.reissue),
        (protocol.frame(b"\x00" + bytes(64)), RemoteLog.reissue),
        (protocol.frame(b"\x00" + bytes(200)), RemoteLog.store_key),
        (protocol.frame(b"\x03" + bytes(31)), RemoteLog.store_key),
        (protocol.frame(b"\x02\x01" + bytes(3)), RemoteLog.reissue),
        (b"\0\0\0\x09\x00", RemoteLog.reissue),
    ):
        own, thread = fake_service(genuine, reply)
        with RemoteLog(own) as remote, pytest.raises((ServiceLostError, ProtocolError)):
            verb(remote)
        thread.join()


def test_an_empty_log_has_the_head_of_an_empty_log():
    """A service that greets with anything else at index 0 is none; its key may sign what it likes."""
    key = fixed_key()
    log = process_log(key)
    log._state = dataclasses.replace(log._state, head=bytes(32))

    def odd(request):
        return protocol.frame(Answering(log, Protection(0)).welcome(request, 0))

    own, thread = fake_service(odd)
    with pytest.raises(ProtocolError, match="empty log"):
        RemoteLog(own)
    thread.join()


def test_a_full_log_is_refused_here_and_there():
    log = process_log(fixed_key())
    log._state = LogState(0, 1, U64_MAX - 1, U64_MAX - 1, bytes(32), bytes(32), CONTEXT)
    with serve_in_thread(log) as remote, pytest.raises(MisuseError, match="full"):
        remote.append(digests_of("1"), context=CONTEXT)
    with pytest.raises(MisuseError, match="full"):
        log.append(digests_of("1"), context=CONTEXT)


def test_the_last_words_of_a_service_that_hangs_up_are_heard():
    """What it sent before a broken connection says why, also when the request could not be sent any more."""
    own, its = socket.socketpair()
    remote_ready = threading.Event()

    def serve():
        size = int.from_bytes(its.recv(4), "big")
        its.sendall(genuine(its.recv(size, socket.MSG_WAITALL)))
        remote_ready.wait(20)
        its.sendall(protocol.frame(protocol.encode_refusal(Why.STORAGE, "the disk is full")))
        its.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with RemoteLog(own) as remote:
        remote_ready.set()
        thread.join()
        with pytest.raises(ServiceLostError, match="the disk is full"):
            remote.append(digests_of("1"), context=CONTEXT)
