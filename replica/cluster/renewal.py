"""Another TLS key and certificate for a replica that keeps its log.

    make_next_pair   makes tls.next.key and tls.next.crt beside the present pair; an operator, who is given the public
                     part, has a list of members ordered that names the certificate (`trustlog-replica member renew`)
    settle           once that list is in force here: gives the pair the names of the old one, which is gone then

Which pair a replica works with is no matter of order: it is the one whose certificate stands in the list under which it
is (`replica.cluster.home`), so one that is killed at any moment comes back with the right one. Until `settle` both are
there. The certificate says that there is a pair: it is written after its key, and renamed after it, so a
tls.next.key that stands alone was never shown to anybody and may be made anew.

`settle` and whoever changes a key's passphrase keep each other out, or one could put the old key's file over the new
key's. A replica does not wait for that: it goes on with the pair under the names that it has, and settles another time.

Whoever went over already knows the new certificate only. A replica that is late shows it to peers that do not take the
old one (`replica.shell.links`), and so learns the list.
"""

from dataclasses import replace

from replica.cluster.home import (
    NEXT_CERTIFICATE_NAME,
    NEXT_KEY_NAME,
    RENEWAL_FILE_NAME,
    TLS_CERTIFICATE_NAME,
    TLS_KEY_NAME,
    ReplicaHome,
)
from replica.cluster.keys import certificate_pem, generate_private_key, make_certificate, write_private_key
from replica.cluster.passphrase import KeysBusyError, only_one
from replica.cluster.replicatoml import HomeError
from replica.cluster.strict_toml import ConfigError
from replica.cluster.writing import give, sync_directory, write_over


def make_next_pair(home: ReplicaHome) -> bool:
    """Make another key and certificate; False if some wait already, and are left as they are.

    home: unlocked; the new key gets the present one's passphrase. HomeError or ConfigError if that cannot be done.
    """
    if home.is_renewed:
        raise HomeError(
            f"{home.certificate_path}: this certificate is in force, and the replica has not worked with it yet: start "
            f"it (trustlog-replica run {home.path}), then make another one"
        )
    if home.waiting_trouble:
        raise HomeError(home.waiting_trouble)
    with only_one(home.path):
        if home.next_pair is not None:
            return False
        try:
            _make(home)
        except OSError as error:
            raise ConfigError(
                f"{home.path}: no new key can be made here: {error.strerror or error}; make room or see to the "
                "folder's permissions, and run the same command again"
            ) from error
    return True


def _make(home: ReplicaHome) -> None:
    key_path, certificate_path = home.path / NEXT_KEY_NAME, home.path / NEXT_CERTIFICATE_NAME
    if certificate_path.exists():
        raise HomeError(
            f"{certificate_path}: its key {key_path.name} is not here; put that back, or, if no list of members names "
            "this certificate (trustlog-replica member list), remove it"
        )
    key_path.unlink(missing_ok=True)
    key = generate_private_key()
    write_private_key(key_path, key, home.passphrase)
    give(key_path, home.key_path)
    sync_directory(home.path)
    content = certificate_pem(make_certificate(home.number, key)).encode()
    write_over(certificate_path, content, 0o600, like=home.key_path)


def settle(home: ReplicaHome) -> ReplicaHome:
    """Give a renewed pair that is in force the names of the old one; OSError if that fails, and all is as usable.

    Nothing is done while another program is changing these keys; the home is then still a renewed one.
    """
    if not home.is_renewed:
        return home
    try:
        with only_one(home.path):
            _take_names(home)
    except KeysBusyError:
        return home
    return replace(home, is_renewed=False)


def _take_names(home: ReplicaHome) -> None:
    renewed_key = home.path / NEXT_KEY_NAME
    if renewed_key.exists():
        renewed_key.replace(home.path / TLS_KEY_NAME)
        sync_directory(home.path)
    (home.path / NEXT_CERTIFICATE_NAME).replace(home.path / TLS_CERTIFICATE_NAME)
    sync_directory(home.path)
    (home.path / RENEWAL_FILE_NAME).unlink(missing_ok=True)
