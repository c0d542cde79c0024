"""Kling passes the vendors' suite, with both generations of its API."""

from submitter.vendors.base import Vendor
from submitter.vendors.kling import ApiKey, KlingV1, KlingV2
from tests.conformance.vendors import VendorSuite


class TestKling(VendorSuite):
    vendor = "kling"

    @classmethod
    def adapters(cls) -> list[Vendor]:
        return [KlingV2(ApiKey("the-key")), KlingV1(ApiKey("the-key"))]
