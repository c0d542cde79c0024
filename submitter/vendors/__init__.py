"""The built-in vendors, by the name that requests and settings use."""

from submitter.vendors.aihubmax import SETUP as AIHUBMAX
from submitter.vendors.base import VendorSetup
from submitter.vendors.kling import SETUP as KLING
from submitter.vendors.novita import HIGHWAY, NOVITA
from submitter.vendors.oxen import SETUP as OXEN

BUILT_IN: dict[str, VendorSetup] = {
    "kling": KLING,
    "novita": NOVITA,
    "highway": HIGHWAY,
    "aihubmax": AIHUBMAX,
    "oxen": OXEN,
}
