"""Imports what the killed processes import, once, before they are forked."""

import asyncpg
import prometheus_client
import uvloop

import receiver.destinations.archive
import receiver.destinations.http
import receiver.dispatcher
import receiver.metrics
import receiver.poller
import receiver.stream_listener
import receiver.worker
import submitter.ledger.postgres.ledger
import submitter.ledger.sqlite.ledger
import submitter.submit
import tests.torture.broken
from submitter.vendors.registry import vendors

vendors()
__all__ = ["asyncpg", "prometheus_client", "receiver", "submitter", "tests", "uvloop"]
