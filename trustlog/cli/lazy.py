"""Commands whose modules are imported when they are asked for: who runs one does not wait for all the others."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import click


class LazyCommands(MutableMapping[str, "click.Command"]):
    """The commands of a group by their names, for ``click.group(commands=...)``; kept in the order they were given in.

    A place is ``"module:name"``. Looking a name up imports its module; listing the names imports nothing. Help and
    completion show what each command does, so they import all.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        """Take the place of each command; a wrong one raises ImportError or AttributeError when it is looked up."""
        self._commands: dict[str, str | click.Command] = dict(places)

    def __getitem__(self, name: str) -> click.Command:
        found = self._commands[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self._commands[name] = getattr(import_module(module), attribute)
        return found

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __contains__(self, name: object) -> bool:
        return name in self._commands

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)
