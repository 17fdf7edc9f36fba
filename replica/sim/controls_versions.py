"""Planted bugs about the application's version; see `replica.sim.controls`. In each, versions are put in force."""

from typing import Any

from replica.sim import planted_versions as planted
from replica.sim.control import Control
from replica.sim.controls_recovery import AWAY
from replica.sim.releaser import Release

_RELEASED: dict[str, Any] = {
    "rolled_back": None,
    "f": 1,
    "faulty": (),
    "strategies": (),
    "liveness_ms": 20_000,
    "releases": tuple(Release(version, 400 * version) for version in range(1, 7)),
}

VERSIONS: tuple[Control, ...] = (
    Control(
        "version-at-once",
        "at one replica a version is in force in the slot of its command",
        ("state",),
        planted.at_once_at_one,
        1,
        _RELEASED,
    ),
    Control(
        "version-not-restored",
        "what was restored or transferred goes on with version 0",
        ("state",),
        planted.not_restored,
        3,
        {**_RELEASED, **AWAY},
    ),
    Control(
        "old-code-goes-on",
        "a replica executes slots of a version that its code does not know",
        ("state",),
        planted.old_code_goes_on,
        3,
        _RELEASED,
    ),
)
VERSIONS_SCRIPTED = {control.name: "versions that are put in force" for control in VERSIONS}
