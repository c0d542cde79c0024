"""Novita passes the vendors' suite."""

from tests.conformance.vendors import VendorSuite


class TestNovita(VendorSuite):
    vendor = "novita"
