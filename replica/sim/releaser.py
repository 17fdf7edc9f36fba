"""An operator who puts versions of the application in force, and the application (`replica.core.versions`)."""

from collections.abc import Iterator
from dataclasses import dataclass

from replica.application import Context, Right
from replica.apps.kv import KeyValue
from replica.core.versions import encode_activation
from replica.sim.commander import Commander
from replica.sim.logs import ClientKey
from replica.sim.setting import Setting

NEWEST = 100
# Where a version leaves the last slot in which it carried something out; clients do not use it.
MARK = b"\xffversion"


class VersionedKeyValue(KeyValue):
    """The key-value store; versions above 0 mark the state with every operation that they carry out."""

    version = NEWEST

    def apply(self, operation: bytes, context: Context) -> bytes:
        """See `KeyValue`."""
        result = super().apply(operation, context)
        if context.version:
            context.state.put(MARK + b"%d" % context.version, b"%d" % context.slot)
        return result

    def accesses(self, operation: bytes, version: int = 0) -> Iterator[tuple[Right, bytes]]:  # noqa: ARG002
        """See `KeyValue`."""
        return super().accesses(operation)


@dataclass(frozen=True, slots=True)
class Release:
    """A version that is put in force, not before `at_ms`."""

    version: int
    at_ms: int


class Releaser(Commander):
    """Puts one version after the other in force."""

    about = "the version"

    def __init__(self, setting: Setting, key: ClientKey, releases: tuple[Release, ...]) -> None:
        super().__init__(setting, key)
        self._releases = list(releases)

    @property
    def waits_for(self) -> list[str]:
        """What is still to happen."""
        return super().waits_for + [f"not put in force: {release}" for release in self._releases]

    def start(self) -> None:
        """Begin, or go on."""
        if self._releases:
            self.world.at(max(self._releases[0].at_ms, self.world.now), self._release)

    def executed(self) -> None:
        """Go on with the next version."""
        self.world.counts["version-activated"] += 1
        self.start()

    def _release(self) -> None:
        version = self._releases.pop(0).version
        self.world.note(f"version {version} is to be in force")
        self.give(encode_activation(version), f"version {version} of the application")
