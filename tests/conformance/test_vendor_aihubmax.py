"""AIHubMax passes the vendors' suite."""

from tests.conformance.vendors import VendorSuite


class TestAIHubMax(VendorSuite):
    vendor = "aihubmax"
