"""A running replica's keys: kept when it starts, and looked at again when it goes over to another list of members.

A running replica does not depend on its key's file, whose passphrase somebody may set, change or take away at any time
(`trustlog-replica keys passphrase`): the key of its certificate stays in memory as long as the list of members has that
certificate. A file is opened again only where another one is needed: the key of a renewed certificate that the next
list has, or of one that waits. That takes the passphrase known so far, or the one that the named file holds by now;
nobody is asked on a terminal. Without it a pair that waits is left aside, and a renewed certificate that is in force
cannot be worked with.
"""

from dataclasses import replace
from pathlib import Path

from replica.cluster.home import ReplicaHome, check_certificate, check_tls_key, waiting_text, with_listed_pair
from replica.cluster.keys import KeptKey, LockedKeyError, load_private_key
from replica.cluster.memberlists import follow, read_links
from replica.cluster.passphrase import PassphraseSource
from replica.cluster.strict_toml import ConfigError


def with_key_kept(home: ReplicaHome) -> ReplicaHome:
    """Return an unlocked home with its key in memory; ConfigError if its file cannot be opened."""
    try:
        return replace(home, kept=KeptKey(home.key_path, home.passphrase))
    except OSError:
        return replace(home, kept=None)  # no such memory here (no /proc): the file is opened each time


def under_next_list(home: ReplicaHome) -> ReplicaHome:
    """Return a home under the list of members that its file leads to now.

    ConfigError if it leads nowhere, or to a list with another certificate than those that are here, or with one whose
    key cannot be opened.
    """
    more = read_links(home.members_path)[len(home.cluster.links) :]
    later = with_listed_pair(replace(home, cluster=follow(home.cluster, more, str(home.members_path))))
    check_certificate(later)
    if home.kept is None or later.place.certificate_der != home.place.certificate_der:
        later = replace(later, passphrase=_passphrase_of(later, later.key_path))
        check_tls_key(later)
        later = with_listed_pair(with_key_kept(later))
    return later if later.is_renewed else _with_waiting_pair(later)


def _with_waiting_pair(home: ReplicaHome) -> ReplicaHome:
    """Return the home with the passphrase of the pair that waits, or with what is wrong with that."""
    if home.next_pair is None and not home.waiting_trouble:
        return home
    try:
        passphrase = _passphrase_of(home, home.next_key_path)
    except ConfigError as error:
        return home if home.waiting_trouble else replace(home, waiting_trouble=waiting_text(str(error)))
    return with_listed_pair(replace(home, passphrase=passphrase))


def _passphrase_of(home: ReplicaHome, path: Path) -> bytes | None:
    """Return what opens a private key: the passphrase that is known, or the one that is found now; else ConfigError."""
    try:
        load_private_key(path, home.passphrase)
    except LockedKeyError:
        found = (home.passphrases or PassphraseSource()).given_now()
        if found is None:
            raise LockedKeyError(
                f"{path}: its passphrase is another one than when the replica was started, and no file was named that "
                "holds it; start the replica again with it"
            ) from None
        load_private_key(path, found.secret, found.source)
        return found.secret
    return home.passphrase
