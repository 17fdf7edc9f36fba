"""Saying CLOSE: the last entry of a TPM log's epoch, before the machine is switched off (`trustlog-replica close`).

The group is stored like any other, so that peers read it after the next boot. It is said once everything before it is
whole in the store: what was attested and lost there could not be attested again after the reboot.
"""

from contextlib import closing

from replica.cluster.home import ReplicaHome
from replica.cluster.strict_toml import ConfigError
from replica.shell.opening import payload_seal
from replica.shell.outbox import settle_last_group, store_epoch_groups
from replica.shell.store import Store, StoreError
from trustlog import BackendKind
from trustlog.tpm.opening import open_log


def close_epoch(home: ReplicaHome) -> int:
    """Close the log of the replica in `home`, which must not run, and return the index of CLOSE.

    ConfigError if its log has no epochs; TrustLogError, StoreError or OSError if it cannot be done.
    """
    if home.settings.trusted_log.backend is not BackendKind.TPM:
        raise ConfigError(f"{home.path}: only a log in a TPM ends with a reboot and has to be closed before it")
    with open_log(home.log_path) as trusted_log:
        seal = payload_seal(home, trusted_log)
        with closing(Store(home.store_path, home.cluster.cluster_id, home.number, seal=seal)) as store:
            settle_last_group(home.number, trusted_log, store)
            last = store.last_group(home.number)
            if trusted_log.last != (0 if last is None else last.last):
                raise StoreError(
                    f"{store.path}: does not hold this replica's own log to its end, {trusted_log.last}; run the "
                    "replica until it has the rest back from its peers, and close it then"
                )
            if not trusted_log.epoch_groups():
                trusted_log.close_epoch()
            store_epoch_groups(home.number, trusted_log, store)
        return trusted_log.last
