"""Runs the vendor conformance suite for Highway."""

from tests.conformance.vendors import VendorSuite


class TestHighway(VendorSuite):
    vendor = "highway"
