"""How the ledger refuses."""

from utils.errors import UserError


class BudgetExceeded(UserError):
    """The plan cannot meet the budget, or more was asked for than was planned."""


class UnplannedRelease(RuntimeError):
    """A query of the private data that no plan contains, or a planned one that was never made."""


class AccountingError(UserError):
    """Two accountants contradict each other: no epsilon may be printed."""
