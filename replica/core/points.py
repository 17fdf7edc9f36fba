"""Points of the curve P-256 (NIST SP 800-186, section 3.2.1.3), of which public keys are made: y² = x³ - 3x + b.

No key is used here: a list of members with one that is no point could be agreed, and nobody could go over to it.
"""

PRIME = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
_COORDINATE_SIZE = 32


def squared_y(x: int) -> int:
    """Return what y² must be at `x`."""
    return (x * x * x - 3 * x + _B) % PRIME


def is_point(raw: bytes) -> bool:
    """Say whether these bytes are an uncompressed point: 0x04 and two coordinates of 32 bytes."""
    if len(raw) != 1 + 2 * _COORDINATE_SIZE or raw[0] != 4:
        return False
    x = int.from_bytes(raw[1 : 1 + _COORDINATE_SIZE], "big")
    y = int.from_bytes(raw[1 + _COORDINATE_SIZE :], "big")
    return x < PRIME and y < PRIME and y * y % PRIME == squared_y(x)
