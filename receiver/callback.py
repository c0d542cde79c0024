"""Whether a callback is believed: its URL, its signature, its schema, its subject. Pure.

The order is the law: the URL's capability before the body is read, the signature over the raw
bytes before they are parsed, and no store before both hold.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from receiver.signature import Secret, verify
from submitter.callback_url import KeyRing, check
from submitter.errors import UrlUnknown
from submitter.task import TERMINAL, Doubted, Report


class ReadsCallbacks(Protocol):
    """The half of a vendor that the receiver needs."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        """Return what a callback says, None when it is about something else; raise Unintelligible."""
        ...


class Door(msgspec.Struct, frozen=True):
    """How one vendor's callbacks are read. With `secrets`, an unsigned one is refused."""

    vendor: ReadsCallbacks
    secrets: tuple[Secret, ...] = ()
    confirm: str = "never"


class Verify(msgspec.Struct, frozen=True):
    """The proofs that a callback must bring."""

    ring: KeyRing
    doors: dict[str, Door]

    def url(self, vendor: str, external_task_id: str, token: str, now_s: float) -> None:
        """Raise UrlUnknown or UrlExpired unless this URL was made here for this vendor's task."""
        if vendor not in self.doors:
            raise UrlUnknown("no such callback URL")
        check(self.ring, vendor, external_task_id, token, now_s)

    def body(
        self, vendor: str, external_task_id: str, headers: Mapping[bytes, bytes], body: bytes, now_s: float
    ) -> Report | None:
        """Return what an authentic body says of the URL's task, None when it speaks of something else.

        Raises SignatureInvalid; UrlUnknown when it speaks of another task; Unintelligible.
        """
        door = self.doors[vendor]
        if door.secrets:
            verify(door.secrets, headers, body, now_s)
        report = door.vendor.read_callback(body, now_s)
        if report is not None and report.external_task_id is not None and report.external_task_id != external_task_id:
            raise UrlUnknown("the body speaks of another task than the URL")
        return report

    def observation(self, vendor: str, report: Report) -> Report | Doubted:
        """Return the report if it is to be believed, or Doubted if the vendor is to be asked first."""
        confirm = self.doors[vendor].confirm
        if confirm == "always" or (confirm == "terminal" and report.status in TERMINAL):
            return Doubted(report.task_id)
        return report
