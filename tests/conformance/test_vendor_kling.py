"""Runs the vendor conformance suite for Kling, with API v1 and v2."""

from submitter.vendors.base import Vendor
from submitter.vendors.kling.credentials import ApiKey
from submitter.vendors.kling.v1 import KlingV1
from submitter.vendors.kling.v2 import KlingV2
from tests.conformance.vendors import VendorSuite


class TestKling(VendorSuite):
    vendor = "kling"
    strict_callbacks = True

    @classmethod
    def adapters(cls) -> list[Vendor]:
        return [KlingV2(ApiKey("the-key")), KlingV1(ApiKey("the-key"))]
