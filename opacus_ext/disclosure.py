"""The door through which private records leave as they are, for evaluation. pipeline/judging.py and eval.py hold it; a
method is given `PrivateData`, which has none."""

from data.spec import Samples
from opacus_ext.errors import UnplannedRelease
from opacus_ext.ledger import Ledger


class Disclosure:
    """The raw records of one set, and the ledger that lists who was shown them."""

    def __init__(self, samples: Samples, ledger: Ledger) -> None:
        self._samples, self._ledger = samples, ledger

    def reveal(self, reason: str) -> Samples:
        """The records, once every planned release has been made."""
        if not self._ledger.complete:
            raise UnplannedRelease(f"reveal('{reason}') before training has finished")
        self._ledger.revealed.append(reason)
        return self._samples
