"""Runs the vendor conformance suite for Novita."""

from tests.conformance.vendors import VendorSuite


class TestNovita(VendorSuite):
    vendor = "novita"
