"""Opening a replica's trusted log: the one place that knows the kinds of backend.

software    an AttestedLog in this very process, in the folder's log/
process     a program of its own (trustlog.service). Where replica.toml names its socket, somebody else runs it
            (see deploy/systemd); otherwise this replica starts it, and again whenever it ends
tpm         a TPM 2.0, whose address stands in the folder's log/tpm.json
"""

from typing import Any

from replica.cluster.home import SETTINGS_NAME, ReplicaHome
from replica.cluster.replicatoml import HomeError
from replica.shell.atrest import CLEAR, Clear, Sealed
from replica.shell.processlog import ProcessLog, StartedService, connecting
from replica.shell.trustedlog import ExternalLog, TrustedLog
from trustlog import BackendKind, open_log
from trustlog.sealed import Files, UnsyncedFiles
from trustlog.tpm.backend import TpmLog
from trustlog.tpm.opening import open_log as open_tpm_log


def payload_seal(home: ReplicaHome, log: TrustedLog) -> Clear:
    """Return what seals the payloads of the replica in `home` at rest, with the key that its log keeps.

    TrustLogError if the log does not release the key.
    """
    if not home.settings.trusted_log.encrypt_store:
        return CLEAR
    if not isinstance(log, ExternalLog | TpmLog):
        raise HomeError(f"{home.path / SETTINGS_NAME}: trusted_log.encrypt_store: this log keeps no key for payloads")
    return Sealed(log.store_key())


def open_trusted_log(home: ReplicaHome, log: Any) -> TrustedLog:  # noqa: ANN401 - structlog
    """Open the log of the replica in `home`; TrustLogError or OSError if that is impossible.

    Its key is that of the folder's log.pub, which was compared with the cluster file when the folder was read.
    """
    key = home.cluster.genesis.members[home.number].log_public_key
    settings = home.settings.trusted_log
    unsynced = home.settings.durability == "memory"
    match settings.backend:
        case BackendKind.SOFTWARE:
            return open_log(home.log_path, files=UnsyncedFiles() if unsynced else Files())
        case BackendKind.PROCESS if settings.socket is not None:
            remedy = f"start its service again (trustlog serve --socket {settings.socket}, or its systemd unit)"
            return ProcessLog(connecting(settings.socket, key), remedy, log)
        case BackendKind.PROCESS:
            service = StartedService(home.log_path, key, unsynced=unsynced)
            return ProcessLog(service, "this replica starts it again by itself", log)
        case BackendKind.TPM:
            return open_tpm_log(home.log_path, files=UnsyncedFiles() if unsynced else Files())
    raise HomeError(f"{home.path / SETTINGS_NAME}: trusted_log.backend: this version has no such backend yet")
