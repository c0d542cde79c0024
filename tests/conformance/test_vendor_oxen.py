"""Oxen passes the vendors' suite."""

from tests.conformance.vendors import VendorSuite


class TestOxen(VendorSuite):
    vendor = "oxen"
