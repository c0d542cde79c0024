"""The vendors, by the name that a request gives."""

from submitter.vendors.base import VendorSetup
from submitter.vendors.kling import SETUP as KLING

CONFIGURE: dict[str, VendorSetup] = {"kling": KLING}
