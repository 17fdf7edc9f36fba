"""The firmware's event log: both forms, laid out by hand; whatever else is refused, within bounds."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trustlog.appraisal.lists import Firmware, u16, u32, usual_boot
from tests.trustlog.appraisal.support import refused
from trustlog import VerificationError
from trustlog.appraisal import bootlog
from trustlog.appraisal.bootlog import SHA1, SHA256, parse_boot_log


@pytest.mark.parametrize("algorithms", [(SHA1, SHA256), (SHA256,), (SHA256, SHA1, 0x000C), None])
@pytest.mark.parametrize("locality", [0, 3])
def test_replaying_leads_to_what_the_firmware_extended(algorithms, locality):
    firmware = usual_boot(algorithms, locality)
    log = parse_boot_log(firmware.log)
    assert log.algorithms == firmware.algorithms
    for one in firmware.algorithms:
        assert log.replay(one) == firmware.pcrs[one]
    assert len(log.events) == len(firmware.extended) + (locality > 0)


def test_a_known_value():
    """One separator in PCR 7 of both banks: SHA(zeros ‖ SHA(00000000))."""
    firmware = Firmware()
    firmware.event(7, 4, bytes(4))
    log = parse_boot_log(firmware.log)
    assert log.replay(SHA256)[7] == hashlib.sha256(bytes(32) + hashlib.sha256(bytes(4)).digest()).digest()
    assert log.replay(SHA1)[7] == hashlib.sha1(bytes(20) + hashlib.sha1(bytes(4)).digest()).digest()


def test_programs_and_texts():
    events = parse_boot_log(usual_boot().log).events
    shim = next(event for event in events if event.is_image)
    assert shim.text() == r"\EFI\debian\shimx64.efi"
    assert shim.digests[SHA256] == hashlib.sha256(b"the shim").digest()
    assert shim.proven_text(SHA256) == ""  # the path is the firmware's word
    texts = {event.text(): event.proven_text(SHA256) for event in events if event.text()}
    assert texts["Firmware 1.2"] == "Firmware 1.2"
    assert texts["grub_cmd: linux /vmlinuz root=/dev/sda1"] == "linux /vmlinuz root=/dev/sda1"
    assert texts["/vmlinuz"] == ""
    assert shim.type_name == "EV_EFI_BOOT_SERVICES_APPLICATION"
    assert events[1].type_name == "EV_EFI_VARIABLE_DRIVER_CONFIG"


def test_whatever_is_longer_than_a_separator_may_be_a_program():
    """A type is in no digest, and a host may give a program's own bytes as its event's data."""
    firmware = Firmware()
    firmware.event(4, 0x04, bytes(4))
    firmware.event(4, 0x06, b"MZ a program")
    firmware.event(4, 0x80000001, b"#!/bin/sh")
    firmware.event(4, 0x01, b"x: #!/bin/sh\0", b"#!/bin/sh")
    firmware.event(4, 0x04, bytes(4), b"a program behind the data of a separator")
    events = parse_boot_log(firmware.log).events
    assert [event.may_be_program(SHA256) for event in events] == [False, True, True, True, True]


def test_an_event_of_an_unknown_type_is_replayed_and_named_by_its_number():
    firmware = Firmware()
    firmware.event(9, 0x12345678, b"?")
    (event,) = parse_boot_log(firmware.log).events
    assert (event.type_name, event.text()) == ("0x12345678", "")
    assert event.proven_text(0x000C) == event.proven_text(SHA256) == ""
    assert parse_boot_log(firmware.log).replay(SHA256) == firmware.pcrs[SHA256]


def test_the_firmwares_no_action_may_name_no_register():
    firmware = Firmware()
    firmware.no_action(b"whatever", pcr=0xFFFFFFFF)
    assert parse_boot_log(firmware.log).replay(SHA256) == {}


def test_a_bank_that_the_log_lacks():
    assert refused(parse_boot_log(usual_boot(None).log).replay, SHA256) == "boot-log-bank"
    assert refused(parse_boot_log(usual_boot().log).replay, 0x1234) == "boot-log-bank"


HEAD = Firmware((SHA256,)).log


def spec(content: bytes) -> bytes:
    return u32(0) + u32(3) + bytes(20) + u32(len(content)) + content


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        HEAD[:-1],
        HEAD + b"\0",
        HEAD + u32(24) + u32(4) + u32(1) + u16(SHA256) + bytes(32) + u32(0),  # no such PCR
        HEAD + u32(0) + u32(4) + u32(1) + u16(SHA1) + bytes(20) + u32(0),  # not one of the log's algorithms
        HEAD + u32(0) + u32(4) + u32(0) + u32(0),  # no digest
        HEAD + u32(0) + u32(4) + u32(2) + (u16(SHA256) + bytes(32)) * 2 + u32(0),  # one twice
        HEAD + u32(0) + u32(4) + u32(9) + bytes(400),
        HEAD + u32(0) + u32(4) + u32(1) + u16(SHA256) + bytes(32) + u32(0xFFFFFFFF),
        spec(b"Spec ID Event03\0"),
        spec(b"Spec ID Event03\0" + bytes(8) + u32(0) + b"\0"),
        spec(b"Spec ID Event03\0" + bytes(8) + u32(9) + bytes(40)),
        spec(b"Spec ID Event03\0" + bytes(8) + u32(1) + u16(SHA256) + u16(20) + b"\0"),
        spec(b"Spec ID Event03\0" + bytes(8) + u32(1) + u16(0x99) + u16(65) + b"\0"),
        spec(b"Spec ID Event03\0" + bytes(8) + u32(2) + (u16(SHA1) + u16(20)) * 2 + b"\0"),
        spec(b"Spec ID Event03\0" + bytes(8) + u32(1) + u16(SHA1) + u16(20) + b"\0\0"),
        u32(24) + u32(4) + bytes(20) + u32(0),
    ],
)
def test_what_is_no_log_is_refused(data):
    assert refused(parse_boot_log, data) == "boot-log-malformed"


def test_the_number_of_events_is_bounded(monkeypatch):
    monkeypatch.setattr(bootlog, "EVENTS_MAX", 3)
    for algorithms in ((SHA256,), None):
        firmware = Firmware(algorithms)
        for _ in range(4):
            firmware.event(0, 4, b"")
        assert refused(parse_boot_log, firmware.log) == "boot-log-malformed"


@given(st.binary(max_size=300), st.sampled_from([b"", HEAD, usual_boot().log]))
def test_arbitrary_bytes_never_escape_as_another_error(data, before):
    try:
        log = parse_boot_log(before + data)
        for algorithm in log.algorithms:
            log.replay(algorithm)
    except VerificationError:
        return
    for event in log.events:
        event.text()
        event.proven_text(SHA256)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_changed_byte_is_refused_changes_a_register_or_is_no_proven_text(flip):
    """Harmless: only what nobody takes for proven may change without changing a register."""
    firmware = usual_boot((SHA256,))
    before = parse_boot_log(firmware.log)
    measured = {bootlog._text(form) for event in before.events if (form := event._proven(SHA256)) is not None}
    harmless = 0
    for position in range(len(firmware.log)):
        changed = bytearray(firmware.log)
        changed[position] ^= flip
        try:
            after = parse_boot_log(bytes(changed))
            if SHA256 not in after.algorithms or after.replay(SHA256) != before.replay(SHA256):
                continue
        except VerificationError:
            continue
        harmless += 1
        assert [event.digests for event in after.events] == [event.digests for event in before.events]
        assert [event.pcr for event in after.events] == [event.pcr for event in before.events]
        # A text that is called proven was measured, even if the event is called something else now.
        assert {event.proven_text(SHA256) for event in after.events} <= measured | {""}
        images = [event.digests for event in before.events if event.is_image]
        assert all(d in [event.digests for event in after.events if event.may_be_program(SHA256)] for d in images)
    assert harmless > 0


@given(st.binary(max_size=200))
def test_paths_of_arbitrary_events(data):
    assert isinstance(bootlog._file_path(data), str)
