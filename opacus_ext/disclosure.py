"""The only way in which private records leave unchanged, for evaluation. Programs hold it; methods hold `PrivateData`,
which offers no such way."""

from data.spec import Samples
from opacus_ext.errors import UnplannedRelease
from opacus_ext.ledger import Ledger


class Disclosure:
    """The raw records of one set, and the ledger that lists why they were revealed."""

    def __init__(self, samples: Samples, ledger: Ledger) -> None:
        self._samples, self._ledger = samples, ledger

    def reveal(self, reason: str) -> Samples:
        """The records. Raises UnplannedRelease until every planned step of every release is booked."""
        if not self._ledger.complete:
            raise UnplannedRelease(f"reveal('{reason}') before training has finished")
        self._ledger.revealed.append(reason)
        return self._samples
