"""The registry of installed vendors: built-in ones, and plugins of other packages (entry points).

A plugin's pyproject.toml has a table `[project.entry-points."kling_relay.vendors"]` with
`acme = "acme_kling:SETUP"`, where SETUP is a `VendorSetup`.
"""

import re
from collections.abc import Mapping
from functools import cache

from submitter.entry_points import entry_points_of
from submitter.errors import InvalidSettings, Problem
from submitter.request import Limits
from submitter.vendors import BUILT_IN
from submitter.vendors.base import VendorSetup

GROUP = "kling_relay.vendors"


@cache
def vendors() -> Mapping[str, VendorSetup]:
    """Return every installed vendor's setup by name; raise InvalidSettings for an invalid entry point."""
    found = dict(BUILT_IN)
    problems = []
    for entry in entry_points_of(GROUP):
        wrong = None
        try:
            setup = entry.load()
        except Exception as error:  # noqa: BLE001 - importing another package may raise anything
            wrong = f"cannot be imported: {error}"
        else:
            if not isinstance(setup, VendorSetup):
                wrong = f"is a {type(setup).__name__}, not a VendorSetup"
            elif not re.fullmatch(r"[a-z][a-z0-9]*", entry.name) or entry.name in found:
                wrong = "its name is taken, or does not match [a-z][a-z0-9]*"
            elif setup.reader.name != entry.name:
                wrong = f"its name differs from the vendor's name {setup.reader.name!r}"
            else:
                found[entry.name] = setup
        if wrong is not None:
            remedy = "Update, correct or remove the package that adds it."
            problems.append(Problem(f"entry point {GROUP}", f"{entry.name} = {entry.value}", wrong, remedy))
    if problems:
        raise InvalidSettings(problems)
    return found


def limits_by_vendor() -> dict[str, Limits]:
    """Return the limits of every installed vendor by name."""
    return {name: setup.reader.limits for name, setup in vendors().items()}
