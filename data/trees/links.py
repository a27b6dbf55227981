"""Links inside an archive, resolved to the files that they stand for."""

from bisect import bisect_left
from collections.abc import Collection
from pathlib import Path

from utils.errors import UserError
from utils.text import listed

Links = dict[
    str, str | None
]  # name of the link -> path of its target from the top; None: outside of the archive
_MOST_HOPS = 40  # as Linux allows


def link_target(name: str, target: str) -> str | None:
    """The path from the top that a symbolic link called `name` leads to, or None if it leaves the archive."""
    if target.startswith("/"):
        return None
    parts = name.split("/")[:-1]
    for part in target.replace("\\", "/").split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def resolve_links(files: Collection[str], links: Links, path: Path, notes: list[str]) -> dict[str, str]:
    """Every name that `links` add -> the file that it stands for; a link to a folder adds all that lies in it.

    UserError for links to nothing. A link to a folder that holds the link adds no file; `notes` gets a line on it.
    """
    resolver = _Resolver(files, links)
    for name in links:
        resolver.expand(name, name, ())
    if resolver.broken:
        raise UserError(
            f"{path}: links to nothing: {listed(resolver.broken)}; pack the files again, with the linked files in "
            f"place of the links (tar --dereference)"
        )
    if resolver.cycles:
        notes.append(f"links to a folder that holds the link are not followed: {listed(resolver.cycles)}")
    return resolver.found


class _Resolver:
    def __init__(self, files: Collection[str], links: Links) -> None:
        self.files, self.links = files, links
        self.sorted = sorted([*files, *links]) if links else []
        self.found: dict[str, str] = {}
        self.broken: list[str] = []
        self.cycles: list[str] = []

    def expand(self, name: str, link: str, above: tuple[str, ...]) -> None:
        """Add what `link` stands for under `name`. `above`: folders whose links led here."""
        target = self._real(self.links[link])
        if target is None:
            self.broken.append(name)
        elif target in self.files:
            self.found[name] = target
        elif target in above or f"{link}/".startswith(f"{target}/" if target else ""):
            self.cycles.append(name)
        else:
            inside = self._below(target)
            if not inside:
                self.broken.append(name)
            for child in inside:
                new = name + child[len(target) :]
                if child in self.links:
                    self.expand(new, child, (*above, target))
                else:
                    self.found[new] = child

    def _real(self, target: str | None) -> str | None:
        """`target` without links on its way; None for a path that leaves the archive or never ends."""
        for _ in range(_MOST_HOPS):
            if target is None:
                return None
            parts = target.split("/")
            heads = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            head = next((head for head in heads if head in self.links), None)
            if head is None:
                return target
            base = self.links[head]
            target = None if base is None else "/".join(filter(None, (base, target[len(head) + 1 :])))
        return None

    def _below(self, folder: str) -> list[str]:
        prefix = f"{folder}/"
        start = bisect_left(self.sorted, prefix)
        stop = bisect_left(self.sorted, f"{folder}0")  # "0" follows "/" in the order of characters
        return self.sorted[start:stop]
