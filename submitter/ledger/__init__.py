"""The ledger: durable storage of tasks, events and deliveries. `open_ledger` picks the engine by URL."""

from submitter.ledger.base import Ledger
from submitter.ledger.engines import file_of, open_ledger

__all__ = ["Ledger", "file_of", "open_ledger"]
