"""Runs the vendor conformance suite for AIHubMax."""

from tests.conformance.vendors import VendorSuite


class TestAIHubMax(VendorSuite):
    vendor = "aihubmax"
