"""How long a run took, stage by stage, also when it was stopped and resumed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import distributed
from utils.artefacts import TIMING
from utils.files import read_json, write_json


class StageTimes:
    """Seconds of each stage, of all starts of the run in `folder` together. A start that is killed outright loses what
    it took since the last `keep`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TIMING
        self._kept: dict[str, float] = {}
        if distributed.is_main() and self._path.exists():
            self._kept = read_json(self._path)
        self._running: tuple[str, float] | None = None

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Time the block, also one that is stopped."""
        self._running = (stage, time.perf_counter())
        try:
            yield
        finally:
            self.keep()
            self._running = None

    def keep(self) -> None:
        """Write down what the stage that is running has taken so far."""
        if self._running is None:
            return
        stage, start = self._running
        now = time.perf_counter()
        self._kept[stage] = self._kept.get(stage, 0.0) + now - start
        self._running = (stage, now)
        if distributed.is_main():
            write_json(self._path, {stage: round(taken, 2) for stage, taken in self._kept.items()})

    def seconds(self) -> dict[str, float]:
        return dict(self._kept)
