"""Tables of names whose modules are imported on first use, so that listing the names is fast."""

import importlib
from collections.abc import Iterator

from utils.errors import UserError, unknown


class Registry:
    """A table name -> object, or name -> "module:attribute" imported on first use.

    Names match regardless of case. `kind` names an entry in messages: the key that chooses one ("eval.extractor"), or a
    noun if there is no key ("method").
    """

    def __init__(self, kind: str, entries: dict[str, object], aliases: dict[str, str] | None = None) -> None:
        """`aliases`: other names -> names of entries."""
        self.kind = kind
        self._aliases = {name.casefold(): entry for name, entry in (aliases or {}).items()}
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def canonical(self, name: str) -> str:
        """The registered spelling of `name`; raises UserError with the nearest name if there is none."""
        found = self._find(name)
        if found is None:
            raise unknown(self.kind, name, self._entries)
        return found

    def resolve(self, name: str) -> object:
        """The object behind `name`, importing its module if it has not been imported yet."""
        name = self.canonical(name)
        target = self._entries[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return target

    def register(self, name: str, target: object) -> None:
        """Add an entry. Raises UserError, which shows both objects, if the name is taken by another one."""
        found = self._find(name)
        if found is not None and self._entries[found] is not target:
            raise UserError(
                f"{self.kind} '{name}' is registered twice: {self._entries[found]!r} and {target!r}"
            )
        self._entries[found or name] = target

    def _find(self, name: str) -> str | None:
        folded = self._aliases.get(str(name).casefold(), str(name)).casefold()
        return next((known for known in self._entries if known.casefold() == folded), None)
