"""Highway passes the vendors' suite."""

from tests.conformance.vendors import VendorSuite


class TestHighway(VendorSuite):
    vendor = "highway"
