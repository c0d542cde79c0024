"""The conformance suite for vendor adapters and their stand-ins. A vendor's test is a subclass that names it.

The vectors in `tests/vectors/<vendor>/` are bodies with their expected results. The suite checks that they
cover every kind of answer, parses them, and parses mutations of them. Then it runs the adapter against the
stand-in over real HTTP, with faults.
"""

from tests.conformance.vendor_end_to_end import EndToEnd
from tests.conformance.vendor_fuzz import Fuzz


class VendorSuite(Fuzz, EndToEnd):
    """Checks the protocol `submitter.vendors.base.Vendor`, and the vendor's stand-in."""
