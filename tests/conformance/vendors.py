"""What every vendor's adapter and stand-in must do. A vendor's test is a subclass that names it.

The vectors in `tests/vectors/<vendor>/` are bodies with what they mean; the suite asks that they
cover what a vendor must be able to say, and then bends them. The road runs the adapter against
the stand-in over real HTTP, with faults.
"""

from tests.conformance.vendor_fuzz import Fuzz
from tests.conformance.vendor_road import Road


class VendorSuite(Fuzz, Road):
    """The promises of `submitter.vendors.base.Vendor`, and of the vendor's stand-in."""
