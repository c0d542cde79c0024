"""Where tasks, events and deliveries are kept. `open_ledger` picks the engine by URL."""

from submitter.ledger.base import Ledger, open_ledger, shown

__all__ = ["Ledger", "open_ledger", "shown"]
