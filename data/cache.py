"""Where results that can be computed again are kept: those of public data in one place, those of private data in
another, which only the owner can read."""

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
    """Where `name`, made from public data, is kept: in the first of `public_places` that holds it or can be written."""
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
    """What is computed from private images without noise and kept: as private as the images themselves.

    The first of `places` that can be written, and that nobody else can read, is used; nothing is made before it is
    needed. The folder has the rights 0700. Files belong into it through `atomic(..., private=True)`, and names that
    depend on images are made with `new_hash`.
    """

    def __init__(self, *places: Path) -> None:
        self._places = places

    @property
    def folder(self) -> Path | None:
        """The place that is used; None if there is none, and nothing is kept."""
        return None if self._opened is None else self._opened[0]

    def new_hash(self):
        """A hash object under a secret random key that lies in the folder, for names of files: without the key a name
        does not say whether a guess of the images is right."""
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
        log.warning(f"results from private images are not kept: no private place in {', '.join(reasons)}")
        return None


def _key_in(folder: Path) -> bytes:
    """The key that lies in `folder`, made if there is none."""
    path = folder / KEY_NAME
    if not path.is_file() or path.stat().st_size != KEY_BYTES:
        with atomic(path, private=True) as temporary:
            temporary.write_bytes(secrets.token_bytes(KEY_BYTES))
    return path.read_bytes()  # of several processes that made one, all take the last
