"""Looking for secret keys in bytes that should hold none: in every form in which a program may have written them."""

import base64
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from replica.cluster.keys import load_private_key
from replica.cluster.replicatoml import load_settings
from trustlog import open_log

WORD = 12  # so many bytes of a key in a row are no accident


def forms(secret: bytes) -> set[bytes]:
    """The secret raw, in hexadecimal and in base64 at every alignment; pieces, so that line breaks do not hide it."""
    found = set()
    for start in range(0, len(secret) - WORD + 1, 4):
        piece = secret[start : start + WORD]
        found |= {piece, piece.hex().encode(), piece.hex().upper().encode(), piece.hex(" ").encode()}
    encoded = [base64.b64encode(bytes(shift) + secret) for shift in range(3)]
    encoded += [base64.urlsafe_b64encode(bytes(shift) + secret) for shift in range(3)]
    return found | {text[8:24] for text in encoded if len(text) >= 28}


def scalar(key) -> bytes:
    return key.private_numbers().private_value.to_bytes(32, "big")


def secrets_of(folder: Path, *, tls: bool = True) -> dict[str, set[bytes]]:
    """Every secret of a replica's folder, whose replica is stopped, by name."""
    found = {"log/seal.key": forms((folder / "log" / "seal.key").read_bytes())}
    state = (folder / "log" / "log.state").read_bytes()
    found["log/log.state"] = {state, state.hex().encode(), base64.b64encode(state)}
    kind = load_settings(folder / "replica.toml").trusted_log.backend
    with open_log(folder / "log", kind=kind) as log:
        found["the log's key"] = forms(scalar(log._private_key))
    if tls:
        key = load_private_key(folder / "tls.key")
        found["the TLS key"] = forms(scalar(key))
        pem = (folder / "tls.key").read_bytes()
        found["tls.key"] = set(pem.splitlines()[1:3])  # the third line is of the public key
        plain = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        found["tls.key in DER"] = {plain, plain.hex().encode()}
    return found


def exposed_in(content: bytes, secrets: dict[str, set[bytes]]) -> list[str]:
    """The names of the secrets of which anything is in the content."""
    return [name for name, known in secrets.items() if any(form in content for form in known)]
