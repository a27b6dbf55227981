"""Download a file from the first mirror that delivers it complete: resumable, checked by its digest.

torchvision.datasets is not used for this: it does not resume, which the 24 GB of Places365 need, and does not keep
the reason of each mirror.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.progress import open_bar

TIMEOUT = 30  # seconds without a byte
ATTEMPTS_PER_MIRROR = 3  # each resumes where the last one stopped
BLOCK = 1 << 18  # bytes


@dataclass(frozen=True)
class RemoteFile:
    """A published file, the same bytes at every URL. `md5` is from its publisher or from torchvision."""

    name: str
    urls: tuple[str, ...]
    md5: str | None = None


class _MirrorError(Exception):
    """The reason why one mirror failed. `retry`: a second request to the same mirror can help."""

    def __init__(self, reason: str, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


def download(remote: RemoteFile, folder: Path) -> Path:
    """Download `remote` into `folder` and return its path; an existing file with the right digest is kept.

    A partial file `<name>.part` is resumed. UserError lists the reason of each mirror.
    """
    target = folder / remote.name
    if target.is_file() and _digest_matches(target, remote.md5):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{remote.name}.part"
    reasons = []
    for url in remote.urls:
        reason = _try_mirror(url, part, remote.md5)
        if reason is None:
            part.replace(target)
            return target
        reasons.append(f"{url}: {reason}")
    raise UserError(
        f"{remote.name}: no mirror delivered it ({'; '.join(reasons)}). "
        f"Download it by other means into {folder} and run the same command again"
    )


def _try_mirror(url: str, part: Path, md5: str | None) -> str | None:
    """Download into `part`; return None on success, else the reason of the failure."""
    reason = "not tried"
    for _ in range(ATTEMPTS_PER_MIRROR):
        resumed = part.is_file() and part.stat().st_size > 0
        try:
            _fetch(url, part)
            if _digest_matches(part, md5):
                return None
            part.unlink()
            # The partial file may have begun with other bytes, so a new start can succeed.
            raise _MirrorError(f"wrong content: its md5 is not {md5}", retry=resumed)
        except _MirrorError as error:
            reason = str(error)
            if not error.retry:
                return reason
    return reason


def _fetch(url: str, part: Path) -> None:
    """Append the missing bytes to `part`, or start over if the server cannot resume."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "prepare_data"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            resuming = have > 0 and response.status == 206
            _receive(response, part, have if resuming else 0)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the file has no further bytes: the digest decides
            return
        raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError) as error:  # URLError and timeouts are OSErrors
        raise _MirrorError(f"connection failed ({error})", retry=True) from error


def _receive(response: http.client.HTTPResponse, part: Path, start: int) -> None:
    expected = response.headers.get("Content-Length")
    total = start + int(expected) if expected else None
    first = response.read(BLOCK)
    if start == 0:
        _refuse_html(response.headers.get("Content-Type", ""), first)
    with (
        part.open("ab" if start else "wb") as file,
        open_bar(
            desc=part.name.removesuffix(".part"), total=total, initial=start, unit="B", unit_scale=True
        ) as bar,
    ):
        block = first
        while block:
            file.write(block)
            bar.update(len(block))
            block = response.read(BLOCK)
    size = part.stat().st_size
    if total is not None and size < total:
        raise _MirrorError(f"the connection closed after {size:,} of {total:,} bytes", retry=True)


def _refuse_html(content_type: str, first: bytes) -> None:
    opening = first[:256].lstrip().lower()
    if "text/html" in content_type or opening.startswith((b"<!doctype html", b"<html")):
        raise _MirrorError("sent an HTML page instead of the file (a login, consent or error page?)")


def _digest_matches(path: Path, md5: str | None) -> bool:
    if md5 is None:
        return True
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == md5
