r"""The firmware's event log: what was measured between power-on and the operating system.

Source: TCG PC Client Platform Firmware Profile Specification, sections 10.2 to 10.4. Linux shows the list as
/sys/kernel/security/tpm0/binary_bios_measurements. Integers are little-endian. The first event always has the old form:

    4 PCR   4 type   20 SHA-1 digest   4 size   size bytes of data

If it is EV_NO_ACTION and its data begins with "Spec ID Event03\0", the log is *crypto-agile*: that data goes on with
4 platform class, 1 minor, 1 major, 1 errata, 1 size of a UINTN, 4 count, then count times (2 algorithm, 2 digest size),
1 size, size bytes of the vendor; and all further events have the form

    4 PCR   4 type   4 count   count times (2 algorithm   digest)   4 size   size bytes of data

Otherwise the log is *legacy*: all events have the old form. Replaying it: a PCR begins with zeros (PCR 0 with the
locality that an EV_NO_ACTION "StartupLocality" names), and every event but EV_NO_ACTION extends its digest.

What a replay proves are the digests, in their order. An event's *data* is proven only as far as the digest is that of
the data (``BootEvent.proven_text``); the path of a program, above all, is the firmware's word: its digest is that of
the program. An event's *type* is in no digest: a host may call a program something else, and give its bytes for the
event's data. What can be a program is therefore every event but those whose proven data is too short for one: the
separators (``BootEvent.may_be_program``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trustlog.appraisal.bytesreader import BytesReader
from trustlog.errors import VerificationError

REASON = "boot-log-malformed"
EVENTS_MAX = 16 * 1024
PCRS = 24
ALGORITHMS_MAX = 8
TEXT_CHARACTERS_MAX = 200
SEPARATOR_BYTES = 4  # what firmware measures where it hands a PCR over (section 3.3.4.3 of the profile)

SHA1, SHA256 = 0x0004, 0x000B
# TCG Algorithm Registry: digest sizes. Unknown algorithms take the size that the log itself names.
_HASHES = {SHA1: "sha1", SHA256: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_SPEC_ID = b"Spec ID Event03\0"
_STARTUP_LOCALITY = b"StartupLocality\0"

EV_NO_ACTION = 0x03
EV_IPL = 0x0D
EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
_TYPES = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    EV_NO_ACTION: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    EV_IPL: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    EV_EFI_BOOT_SERVICES_APPLICATION: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}
_IMAGES = frozenset({EV_EFI_BOOT_SERVICES_APPLICATION, 0x80000004, 0x80000005})
# Types whose data is text for people.
_TEXTS = frozenset({0x01, 0x05, 0x08, EV_IPL, 0x80000007})


@dataclass(frozen=True, slots=True)
class BootEvent:
    """One event: the PCR, the TCG's type, digests by algorithm identifier, and the data as it stands in the log."""

    pcr: int
    type: int
    digests: Mapping[int, bytes]
    data: bytes

    @property
    def type_name(self) -> str:
        """The type's name in the specification, or its number."""
        return _TYPES.get(self.type, f"{self.type:#010x}")

    @property
    def is_image(self) -> bool:
        """Tell whether a program was measured: its digest is that of the image."""
        return self.type in _IMAGES

    def may_be_program(self, algorithm: int) -> bool:
        """Tell whether a program may have been measured: not if the digest is proven to be that of a separator."""
        proven = self._proven(algorithm)
        return proven is None or len(proven) > SEPARATOR_BYTES

    def proven_text(self, algorithm: int) -> str:
        """Return that part of ``text`` which the digest proves, nothing if it proves none.

        Boot loaders measure their commands without the final zero, and without a prefix such as "grub_cmd: ".
        """
        proven = self._proven(algorithm) if self.type in _TEXTS else None
        return "" if proven is None else _text(proven)

    def _proven(self, algorithm: int) -> bytes | None:
        """Return that part of the data which the digest is of; None if there is none."""
        digest, name = self.digests.get(algorithm), _HASHES.get(algorithm)
        if digest is None or name is None:
            return None
        data = self.data.removesuffix(b"\0")
        for form in (self.data, data, data.partition(b": ")[2]):
            if hashlib.new(name, form).digest() == digest:
                return form
        return None

    def text(self) -> str:
        """Return what the data says in a line for people, or nothing: the firmware's word."""
        if self.is_image:
            return _file_path(self.data)
        return _text(self.data) if self.type in _TEXTS else ""


@dataclass(frozen=True, slots=True)
class BootLog:
    """A parsed log. ``algorithms``: those that every event has a digest of; a legacy log has SHA-1 only."""

    algorithms: tuple[int, ...]
    events: Sequence[BootEvent]
    startup_locality: int = 0

    def replay(self, algorithm: int) -> dict[int, bytes]:
        """Return the value of every PCR that the log extends; VerificationError if the log lacks the algorithm."""
        name = _HASHES.get(algorithm)
        if algorithm not in self.algorithms or name is None:
            raise VerificationError("boot-log-bank", f"the firmware's event log has no digests of {algorithm:#06x}")
        size = hashlib.new(name).digest_size
        values: dict[int, bytes] = {}
        if self.startup_locality:
            values[0] = bytes(size - 1) + bytes([self.startup_locality])
        for event in self.events:
            if event.type != EV_NO_ACTION:
                before = values.get(event.pcr, bytes(size))
                values[event.pcr] = hashlib.new(name, before + event.digests[algorithm]).digest()
        return values


def parse_boot_log(data: bytes) -> BootLog:
    """Read a log of either form; VerificationError("boot-log-malformed") for anything else."""
    reader = BytesReader(data, "firmware's event log", REASON)
    first = _old_event(reader)
    if first.type != EV_NO_ACTION or not first.data.startswith(_SPEC_ID):
        events = [first]
        while not reader.is_at_end:
            events.append(_old_event(reader))
            _bound(reader, events)
        return BootLog((SHA1,), events, _locality(events))
    sizes = _algorithms(first.data)
    events = []
    while not reader.is_at_end:
        events.append(_event(reader, sizes))
        _bound(reader, events)
    return BootLog(tuple(sizes), events, _locality(events))


def _bound(reader: BytesReader, events: Sequence[BootEvent]) -> None:
    if len(events) > EVENTS_MAX:
        raise reader.error(f"has more than {EVENTS_MAX} events")


def _old_event(reader: BytesReader) -> BootEvent:
    pcr = reader.bounded(4, PCRS - 1, "PCR")
    event_type = reader.number(4)
    digest = reader.take(20)
    return BootEvent(pcr, event_type, {SHA1: digest}, reader.take(reader.number(4)))


def _event(reader: BytesReader, sizes: Mapping[int, int]) -> BootEvent:
    pcr = reader.number(4)
    event_type = reader.number(4)
    # Some firmware writes EV_NO_ACTION with PCR 0xFFFFFFFF; it extends nothing.
    if pcr >= PCRS and event_type != EV_NO_ACTION:
        raise reader.error(f"has an event for PCR {pcr}, which there is not")
    count = reader.bounded(4, ALGORITHMS_MAX, "a count of digests")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = reader.number(2)
        if algorithm not in sizes or algorithm in digests:
            raise reader.error(f"has a digest of algorithm {algorithm:#06x} where none belongs")
        digests[algorithm] = reader.take(sizes[algorithm])
    if len(digests) != len(sizes):
        raise reader.error("has an event without all of its digests")
    return BootEvent(pcr, event_type, digests, reader.take(reader.number(4)))


def _algorithms(specification: bytes) -> dict[int, int]:
    reader = BytesReader(specification, "firmware's event log's first event", REASON)
    reader.take(len(_SPEC_ID) + 8)
    count = reader.bounded(4, ALGORITHMS_MAX, "a count of algorithms")
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, size = reader.number(2), reader.bounded(2, 64, "a digest's size")
        known = _HASHES.get(algorithm)
        if algorithm in sizes or (known is not None and hashlib.new(known).digest_size != size):
            raise reader.error(f"gives algorithm {algorithm:#06x} a digest of {size} bytes, or names it twice")
        sizes[algorithm] = size
    reader.take(reader.number(1))
    if not sizes or not reader.is_at_end:
        raise reader.error("does not end where it should")
    return sizes


def _locality(events: Sequence[BootEvent]) -> int:
    for event in events:
        if event.type == EV_NO_ACTION and event.data.startswith(_STARTUP_LOCALITY) and len(event.data) == 17:
            return event.data[16]
    return 0


def _text(data: bytes) -> str:
    wide = data[1:2] == b"\0"
    return data.decode("utf-16-le" if wide else "utf-8", "replace").rstrip("\0")[:TEXT_CHARACTERS_MAX]


def _file_path(data: bytes) -> str:
    """Return the file path in a UEFI_IMAGE_LOAD_EVENT's device path (UEFI specification, section 10.3), or nothing.

    8 address, 8 length, 8 link-time address, 8 size of the device path; nodes: 1 type, 1 subtype, 2 length, content.
    """
    reader = BytesReader(data, "event", REASON)
    try:
        reader.take(24)
        size = reader.number(8)
        nodes = BytesReader(reader.take(size), "device path", REASON)
        parts: list[str] = []
        while True:  # up to the node that ends the path, or beyond its end
            node, subtype, length = nodes.number(1), nodes.number(1), nodes.number(2)
            content = nodes.take(max(0, length - 4))
            if (node, subtype) == (4, 4):
                parts.append(content.decode("utf-16-le", "replace").rstrip("\0"))
            if length < 4 or node == 0x7F:
                break
    except VerificationError:
        return ""
    return "".join(parts)[:TEXT_CHARACTERS_MAX]
