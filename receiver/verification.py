"""Callback verification: capability URL, webhook signature, schema, subject. Pure.

The order is the law: verify the URL before the body is read, verify the signature over the raw bytes
before they are parsed, and touch no store before both are valid.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from receiver.signature import Secret, verify
from submitter.callback_url import KeyRing, check
from submitter.errors import UrlUnknown
from submitter.observation import Report, Unconfirmed
from submitter.task import TERMINAL


class ReadsCallbacks(Protocol):
    """The part of a vendor's adapter that the receiver needs."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        """Return the report of a callback, or None when it is about something else; raise Unintelligible."""
        ...


class VendorCheck(msgspec.Struct, frozen=True):
    """How to verify and read one vendor's callbacks.

    With `secrets`, an unsigned callback is refused. `confirm`: a poll must confirm no report (`never`),
    those that end a task (`terminal`), or all (`always`).
    """

    vendor: ReadsCallbacks
    secrets: tuple[Secret, ...] = ()
    confirm: str = "never"


class Verifier(msgspec.Struct, frozen=True):
    """Verifies callbacks: URLs by the key ring, bodies by each vendor's check."""

    ring: KeyRing
    checks: dict[str, VendorCheck]

    def url(self, vendor: str, external_task_id: str, token: str, now_s: float) -> None:
        """Raise UrlUnknown or UrlExpired unless this relay created this URL for this task and vendor."""
        if vendor not in self.checks:
            raise UrlUnknown("no such callback URL")
        check(self.ring, vendor, external_task_id, token, now_s)

    def body(
        self, vendor: str, external_task_id: str, headers: Mapping[bytes, bytes], body: bytes, now_s: float
    ) -> Report | None:
        """Return the report of an authentic body, or None when it is about no task.

        Raises SignatureInvalid, Unintelligible, and UrlUnknown when it is about another task than the URL.
        """
        vendor_check = self.checks[vendor]
        if vendor_check.secrets:
            verify(vendor_check.secrets, headers, body, now_s)
        report = vendor_check.vendor.read_callback(body, now_s)
        if report is not None and report.external_task_id is not None and report.external_task_id != external_task_id:
            raise UrlUnknown("the body is about another task than the URL")
        return report

    def observation(self, vendor: str, report: Report) -> Report | Unconfirmed:
        """Return the report, or Unconfirmed if a poll must confirm it first."""
        confirm = self.checks[vendor].confirm
        if confirm == "always" or (confirm == "terminal" and report.status in TERMINAL):
            return Unconfirmed(report.task_id, raw=report.raw)
        return report
