"""Measures a TPM log's append on a software TPM: python -m tests.trustlog.tpm.append_bench [appends]"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.support.swtpm import software_tpm
from tests.trustlog.support import CONTEXT, digests_of
from trustlog.sealed import Files, UnsyncedFiles
from trustlog.tpm.enrol import create
from trustlog.tpm.opening import open_log
from trustlog.verification import verify_append


def main(count):
    digests = digests_of(*map(str, range(32)))
    with tempfile.TemporaryDirectory() as folder, software_tpm(Path(folder) / "tpm") as machine:
        create(Path(folder) / "log", address=machine.address).close()
        for name, files in (("with fsync", Files()), ("without fsync", UnsyncedFiles())):
            with open_log(Path(folder) / "log", files=files) as log:
                times, verifying = [], []
                for _ in range(count):
                    began = time.perf_counter()
                    attestation = log.append(digests, context=CONTEXT)
                    said = time.perf_counter()
                    verify_append(log.identity, attestation, digests, context=CONTEXT)
                    times.append(said - began)
                    verifying.append(time.perf_counter() - said)
                times.sort()
                print(
                    f"{name}: append of a group of 32: median {1e3 * statistics.median(times):.2f} ms, "
                    f"p99 {1e3 * times[int(0.99 * count)]:.2f} ms; verifying it: {1e3 * statistics.median(verifying):.2f} ms"
                )
                began = time.perf_counter()
                for _ in range(count):
                    log.client.pcr_extend(9, bytes(32))
                    log.client.quote(log.config.handle, [9], bytes(32))
                print(f"extend and quote alone: {1e3 * (time.perf_counter() - began) / count:.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
