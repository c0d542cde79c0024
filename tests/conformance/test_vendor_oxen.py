"""Runs the vendor conformance suite for Oxen.ai."""

from tests.conformance.vendors import VendorSuite


class TestOxen(VendorSuite):
    vendor = "oxen"
