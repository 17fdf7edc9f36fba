"""Builders of the lists that firmware and kernel keep, laid out by hand from the specifications' tables.

A builder remembers what a TPM's PCRs would hold; `extend` does the same to a real one.
"""

from __future__ import annotations

import hashlib
import struct

SIZES = {0x0004: ("sha1", 20), 0x000B: ("sha256", 32), 0x000C: ("sha384", 48)}


def u16(number: int) -> bytes:
    return struct.pack("<H", number)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def hashed(algorithm: int, data: bytes) -> bytes:
    return hashlib.new(SIZES[algorithm][0], data).digest()


class Firmware:
    """An event log. algorithms: the banks of a crypto-agile log; None makes a legacy one (SHA-1 only)."""

    def __init__(self, algorithms=(0x0004, 0x000B), locality=0) -> None:
        self.algorithms = algorithms or (0x0004,)
        self.legacy = algorithms is None
        self.pcrs = {one: {} for one in self.algorithms}
        self.extended: list[tuple[int, dict[int, bytes]]] = []
        self.log = b""
        if not self.legacy:
            sizes = b"".join(u16(one) + u16(SIZES[one][1]) for one in algorithms)
            spec = b"Spec ID Event03\0" + u32(0) + bytes([0, 2, 0, 2]) + u32(len(algorithms)) + sizes + b"\0"
            self.log += u32(0) + u32(3) + bytes(20) + u32(len(spec)) + spec
        if locality:
            for one in self.algorithms:
                self.pcrs[one][0] = bytes(SIZES[one][1] - 1) + bytes([locality])
            self.no_action(b"StartupLocality\0" + bytes([locality]))

    def _write(self, pcr: int, kind: int, digests: dict[int, bytes], data: bytes) -> None:
        if self.legacy:
            self.log += u32(pcr) + u32(kind) + digests[0x0004] + u32(len(data)) + data
            return
        body = b"".join(u16(one) + digests[one] for one in self.algorithms)
        self.log += u32(pcr) + u32(kind) + u32(len(digests)) + body + u32(len(data)) + data

    def no_action(self, data: bytes, pcr: int = 0) -> None:
        self._write(pcr, 3, {one: bytes(SIZES[one][1]) for one in self.algorithms}, data)

    def event(self, pcr: int, kind: int, data: bytes, measured: bytes | None = None) -> None:
        """Measure `measured`, or the data itself."""
        digests = {one: hashed(one, data if measured is None else measured) for one in self.algorithms}
        for one, digest in digests.items():
            before = self.pcrs[one].get(pcr, bytes(len(digest)))
            self.pcrs[one][pcr] = hashed(one, before + digest)
        self.extended.append((pcr, digests))
        self._write(pcr, kind, digests, data)

    def image(self, pcr: int, path: str, content: bytes) -> None:
        """A program: UEFI_IMAGE_LOAD_EVENT with a device path of a hard disk node, a file path, and the end."""
        text = path.encode("utf-16-le") + b"\0\0"
        nodes = bytes([4, 1]) + u16(42) + bytes(38)
        nodes += bytes([4, 4]) + u16(4 + len(text)) + text + bytes([0x7F, 0xFF]) + u16(4)
        data = struct.pack("<QQQQ", 0x1000, len(content), 0, len(nodes)) + nodes
        self.event(pcr, 0x80000003, data, content)

    def extend(self, tpm) -> None:
        """Do to a TPM's SHA-256 bank what the firmware did."""
        for pcr, digests in self.extended:
            if 0x000B in digests:
                tpm.pcr_extend(pcr, digests[0x000B])


def usual_boot(algorithms=(0x0004, 0x000B), locality=0) -> Firmware:
    """What a machine with shim and GRUB measures, in short."""
    firmware = Firmware(algorithms, locality)
    firmware.event(0, 0x08, "Firmware 1.2".encode("utf-16-le") + b"\0\0")
    firmware.event(7, 0x80000001, b"SecureBoot: 1")
    for pcr in range(8):
        firmware.event(pcr, 0x04, bytes(4))
    firmware.image(4, r"\EFI\debian\shimx64.efi", b"the shim")
    firmware.image(4, r"\EFI\debian\grubx64.efi", b"the boot loader")
    firmware.event(8, 0x0D, b"grub_cmd: linux /vmlinuz root=/dev/sda1\0", b"linux /vmlinuz root=/dev/sda1")
    firmware.event(9, 0x0D, b"/vmlinuz\0", b"the kernel")
    return firmware


class Kernel:
    """An IMA list. padded: the SHA-256 bank is extended as Linux before 5.8 did."""

    def __init__(self, *, padded=False) -> None:
        self.padded = padded
        self.list = b""
        self.sha1 = bytes(20)
        self.sha256 = bytes(32)
        self.extended: list[tuple[bytes, bytes]] = []

    def _entry(self, template: bytes, data: bytes, hashed_data: bytes, *, violation=False, pcr=10) -> None:
        digest = bytes(20) if violation else hashlib.sha1(hashed_data).digest()
        sized = b"" if template == b"ima" else u32(len(data))
        self.list += u32(pcr) + digest + u32(len(template)) + template + sized + data
        in_sha1 = b"\xff" * 20 if violation else digest
        in_sha256 = digest + bytes(12) if self.padded else hashlib.sha256(hashed_data).digest()
        in_sha256 = b"\xff" * 32 if violation else in_sha256
        if pcr != 10:
            return
        self.extended.append((in_sha1, in_sha256))
        self.sha1 = hashlib.sha1(self.sha1 + in_sha1).digest()
        self.sha256 = hashlib.sha256(self.sha256 + in_sha256).digest()

    def ng(self, path: str, content: bytes, *, signature: bytes | None = None, violation=False, pcr=10) -> None:
        """A file with template ima-ng, or with ima-sig if there is a signature (which may be empty)."""
        digest = b"sha256:\0" + hashlib.sha256(content).digest()
        data = u32(len(digest)) + digest + u32(len(path) + 1) + path.encode() + b"\0"
        if signature is not None:
            data += u32(len(signature)) + signature
        self._entry(b"ima-ng" if signature is None else b"ima-sig", data, data, violation=violation, pcr=pcr)

    def old(self, path: str, content: bytes) -> None:
        """A file with template ima."""
        digest = hashlib.sha1(content).digest()
        self._entry(b"ima", digest + u32(len(path)) + path.encode(), digest + path.encode().ljust(256, b"\0"))

    def other(self, template: str, data: bytes) -> None:
        """An entry of a template whose fields nobody here knows."""
        self._entry(template.encode(), data, data)

    def extend(self, tpm) -> None:
        """Do to a TPM's SHA-256 bank what the kernel did."""
        for _, digest in self.extended:
            tpm.pcr_extend(10, digest)


def usual_programs(*, padded=False) -> Kernel:
    kernel = Kernel(padded=padded)
    kernel.ng("boot_aggregate", b"PCRs 0 to 9")
    kernel.ng("/usr/lib/systemd/systemd", b"systemd")
    kernel.ng("/usr/bin/python3.11", b"python", signature=b"\x03\x02signed")
    kernel.ng("/etc/passwd", b"written while it was read", violation=True)
    kernel.ng("/usr/bin/true", b"true", signature=b"")
    return kernel
