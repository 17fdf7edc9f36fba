"""Makes tests/trustlog/vectors/tpm.json: a short TPM log over two epochs. Signatures differ in every run.

python -m tests.trustlog.tpm.make_vectors > tests/trustlog/vectors/tpm.json
"""

from __future__ import annotations

import hashlib
import json

from tests.trustlog.support import CONTEXT, fixed_key
from tests.trustlog.tpm.support import SIGNER, forged_quote, public_of, sign
from trustlog import AppendStatement, BackendKind, entry_digest, log_id
from trustlog.statements import CLOSE_PAYLOAD, open_payload
from trustlog.tpm import chain
from trustlog.tpm.chain import TpmPins

KEY = fixed_key(14)
PINS = TpmPins(14, hashlib.sha256(b"what the loader measured").digest(), SIGNER, 7 << 32 | 2)


def group(epoch, first, payloads, before, extends_from=None):
    digests = [entry_digest(payload) for payload in payloads]
    own_id = log_id(public_of(KEY))
    event = chain.event_digest(own_id, first, CONTEXT, digests)
    after = chain.extended(extends_from or before, event)
    header = (BackendKind.TPM, CONTEXT, own_id, epoch)
    statement = AppendStatement(*header, first, first + len(payloads) - 1, before, after).encode()
    attest = forged_quote({14: after}, chain.asked(statement), resets=epoch >> 32, restarts=epoch & 0xFFFFFFFF)
    said = {"payloads": [payload.hex() for payload in payloads], "event": event.hex(), "pcr": after.hex()}
    return after, said | {"statement": statement.hex(), "attest": attest.hex(), "signature": sign(KEY, attest).hex()}


def main():
    epoch, following = PINS.epoch, 8 << 32
    one, first = group(epoch, 1, [b"first"], PINS.base)
    two, second = group(epoch, 2, [b"second", b"third"], one)
    closed, close = group(epoch, 4, [CLOSE_PAYLOAD], two)
    head = chain.head(epoch, closed, closed=True)
    opened, opening = group(following, 5, [open_payload(4, head)], closed, extends_from=PINS.base)
    _, last = group(following, 6, [b"fourth"], opened)
    heads = [chain.head(epoch, PINS.base), chain.head(epoch, one), chain.head(epoch, two), head]
    heads += [chain.head(following, opened), chain.head(following, bytes.fromhex(last["pcr"]))]
    document = {
        "public_key": public_of(KEY).hex(),
        "context": CONTEXT.hex(),
        "pins": PINS.encode().hex(),
        "groups": [first, second, close, opening, last],
        "heads": [one_head.hex() for one_head in heads],
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
