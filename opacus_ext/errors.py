"""The errors with which the ledger refuses a plan or a query."""

from utils.errors import UserError


class BudgetExceeded(UserError):
    """The plan cannot meet the budget, or more steps were requested than planned."""


class UnplannedRelease(RuntimeError):
    """A query of the private data that is not planned, or a planned query that was not executed."""


class AccountingError(UserError):
    """Two accountants contradict each other: no epsilon may be reported."""
