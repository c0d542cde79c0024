"""The vendors that are installed: ours, and those that other packages add by an entry point.

Such a package's pyproject.toml says `[project.entry-points."kling_relay.vendors"]` and below it
`acme = "acme_kling:SETUP"`, where SETUP is a `VendorSetup`.
"""

import re
from collections.abc import Mapping
from functools import cache

from submitter.errors import InvalidSettings, Problem
from submitter.plugins import entry_points_of
from submitter.request import Limits
from submitter.vendors import BUILT_IN
from submitter.vendors.base import VendorSetup

GROUP = "kling_relay.vendors"


@cache
def vendors() -> Mapping[str, VendorSetup]:
    """Return every vendor's setup by its name; raise InvalidSettings for an entry point that cannot be used."""
    found = dict(BUILT_IN)
    problems = []
    for entry in entry_points_of(GROUP):
        wrong = None
        try:
            setup = entry.load()
        except Exception as error:  # noqa: BLE001 - another package may do anything when it is imported
            wrong = f"it cannot be imported: {error}"
        else:
            if not isinstance(setup, VendorSetup):
                wrong = f"it is a {type(setup).__name__}, and not a VendorSetup"
            elif not re.fullmatch(r"[a-z][a-z0-9]*", entry.name) or entry.name in found:
                wrong = "its name must be of its own, of a-z and 0-9"
            elif setup.reader.name != entry.name:
                wrong = f"its vendor calls itself {setup.reader.name!r}"
            else:
                found[entry.name] = setup
        if wrong is not None:
            remedy = "Mend or remove the package that adds it."
            problems.append(Problem(f"entry point {GROUP}", f"{entry.name} = {entry.value}", wrong, remedy))
    if problems:
        raise InvalidSettings(problems)
    return found


def limits() -> dict[str, Limits]:
    """Return what every installed vendor takes and can do."""
    return {name: setup.reader.limits for name, setup in vendors().items()}
