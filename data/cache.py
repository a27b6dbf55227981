"""Caches of results that can be computed again: one for results of public data, and one for results of private data,
which only the owner can read."""

import hashlib
import os
import secrets
from functools import cached_property
from pathlib import Path

from utils.files import atomic
from utils.places import user_cache
from utils.private_files import make_private_folder
from utils.runtime import log

CACHE_NAME = ".cache"  # in a data root: of public data; in the folder of a prepared private set: of that set
KEY_NAME, KEY_BYTES = "key", 32


def public_cache(folder: Path, name: str) -> Path:
    """The place for `name`, a result of public data: the first of `public_places` that holds it or can be written."""
    for place in public_places(folder):
        if (place / name).exists():
            return place / name
        if _can_be_written(place):
            if place != folder:
                log.info(f"{folder} cannot be written to; {name} is kept in {place}")
            return place / name
    return folder / name  # writing to it fails, with the reason


def public_places(folder: Path) -> list[Path]:
    """The folders that may hold public results, in order: `folder`, else one in the user's own cache."""
    own = user_cache()
    return [folder, *([] if own is None else [own / "public"])]


def _can_be_written(folder: Path) -> bool:
    """True if `folder`, or the nearest of its parents that exists, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def private_places(prepared: Path) -> list[Path]:
    """The folders that may hold the private cache of the set in `prepared`, in order: next to the images, else in the
    user's own cache."""
    own = user_cache()
    name = hashlib.sha256(os.fsencode(prepared.resolve())).hexdigest()[:16]
    return [prepared / CACHE_NAME, *([] if own is None else [own / "private" / name])]


class PrivateCache:
    """Results that are computed from private images without noise: as private as the images themselves.

    Uses the first of `places` that can be written and that nobody else can read. The folder is created when it is
    needed, with permissions 0700. Write files with `atomic(..., private=True)`, and make names that depend on images
    with `new_hash`.
    """

    def __init__(self, *places: Path) -> None:
        self._places = places

    @property
    def folder(self) -> Path | None:
        """The place that is used; None if no place is private, and nothing is kept."""
        return None if self._opened is None else self._opened[0]

    def new_hash(self) -> "hashlib.blake2b":
        """A hash object for names of files, keyed with a secret random key in the folder: without the key, a name does
        not confirm a guess of the images."""
        return hashlib.blake2b(key=self._opened[1], digest_size=16)

    @cached_property
    def _opened(self) -> tuple[Path, bytes] | None:
        reasons = []
        for place in self._places:
            try:
                make_private_folder(place)
                if not os.access(place, os.W_OK):
                    raise PermissionError(None, "not writable")
                opened = place, _key_in(place)
            except OSError as error:
                reasons.append(f"{place} ({error.strerror or error})")
                continue
            if reasons:
                log.info(
                    f"results from private images cannot be kept in {reasons[0]}; {place} is used instead"
                )
            return opened
        log.warning(f"results from private images are not kept: no private folder among {', '.join(reasons)}")
        return None


def _key_in(folder: Path) -> bytes:
    """The key in `folder`, which is created if it is missing."""
    path = folder / KEY_NAME
    if not path.is_file() or path.stat().st_size != KEY_BYTES:
        with atomic(path, private=True) as temporary:
            temporary.write_bytes(secrets.token_bytes(KEY_BYTES))
    return path.read_bytes()  # if several processes created a key, all use the last one
