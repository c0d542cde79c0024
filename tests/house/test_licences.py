"""What is installed for users has a licence that is on a list: the package, its sandbox, and every extra."""

import re
import tomllib
from importlib import metadata

import pytest
from license_expression import AND, OR, ExpressionError, ExpressionParseError, get_spdx_licensing
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.pages import ROOT

PERMISSIVE = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "PSF-2.0", "Unlicense", "0BSD"}
# Their terms are about their own files. These are imported as they were published, are no part of this package,
# and can be replaced by their users, which is what the LGPL asks of those who link to a library.
IMPORTED = {"MPL-2.0", "LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only", "LGPL-3.0-or-later"}
ALLOWED = PERMISSIVE | IMPORTED
SPELLED = {  # as packages write what has an identifier of SPDX
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",  # the classifier of all of them
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
ELSEWHERE: dict[str, str] = {}  # distribution: licence, of those that other platforms install
PLATFORMS: tuple[dict[str, str], ...] = (
    {},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
    {"sys_platform": "darwin", "platform_system": "Darwin"},
)
SPDX = get_spdx_licensing()


def stated(found: metadata.PackageMetadata) -> list[str]:
    """Return what a distribution states: an SPDX expression, else its licence field, else its classifiers."""
    fields = [*(found.get_all("License-Expression") or ()), *(found.get_all("License") or ()), ""]
    field = fields[0]
    classifiers = [
        one.rpartition(" :: ")[2] for one in found.get_all("Classifier") or () if one.startswith("License :: ")
    ]
    return [field] if is_known(field) or not classifiers else classifiers


def is_known(text: str) -> bool:
    try:
        return bool(text) and SPDX.parse(SPELLED.get(text, text), validate=True, strict=True) is not None
    except (ExpressionError, ExpressionParseError):
        return False


def is_allowed(text: str) -> bool:
    """Return whether all licences of an expression are allowed; of alternatives, one."""

    def holds(node: object) -> bool:
        if isinstance(node, AND | OR):
            return (all if isinstance(node, AND) else any)(holds(part) for part in node.args)
        return str(node) in ALLOWED

    return is_known(text) and holds(SPDX.parse(SPELLED.get(text, text)))


def problem_of(name: str, licences: list[str]) -> str | None:
    """Return what is wrong with the licences of a distribution, and what to do about it."""
    refused = [text for text in licences if not is_allowed(text)]
    if licences and not refused:
        return None
    shown = ", ".join(repr(text[:60]) for text in refused) or "none"
    return (
        f"{name}: its licence ({shown}) is not on the list of tests/house/test_licences.py. Read it. Add it there if it"
        " is permissive, or asks for nothing of those who import it; else remove the dependency."
    )


def installed_for_users() -> set[str]:
    """Return the names of all distributions that the package, its extras and `requirements.txt` install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    to_read = [Requirement(text) for text in (*project["dependencies"], *(one for extra in extras for one in extra))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while to_read:
        requirement = to_read.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name not in ELSEWHERE:
            to_read += [one for one in map(Requirement, metadata.requires(name) or ()) if applies(one.marker, wanted)]
    pins = re.findall(r"^(\S+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return {name for name, _ in seen} | {canonicalize_name(name) for name in pins}


def applies(marker: Marker | None, extras: frozenset[str]) -> bool:
    """Return whether a requirement is installed on any platform."""
    return marker is None or any(
        marker.evaluate({"extra": extra, **platform}) for extra in (*extras, "") for platform in PLATFORMS
    )


def test_every_licence_is_on_the_list() -> None:
    names = installed_for_users()
    assert {"starlette", "av", "aiokafka", "botocore", "hatchling"} <= names
    unknown = [name for name in names - set(ELSEWHERE) if not is_installed(name)]
    assert unknown == [], "other platforms install these: add their licences to ELSEWHERE"
    found = {name: [ELSEWHERE[name]] if name in ELSEWHERE else stated(metadata.metadata(name)) for name in names}
    problems = [problem for name, licences in sorted(found.items()) if (problem := problem_of(name, licences))]
    assert not problems, "\n".join(problems)


def is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    ("licences", "allowed"),
    [
        (["MIT"], True),
        (["Apache Software License", "BSD License"], True),
        (["Apache-2.0 AND BSD-2-Clause"], True),
        (["GPL-3.0-only OR MIT"], True),
        (["LGPL-3.0-or-later"], True),
        (["GPL-3.0-only"], False),
        (["AGPL-3.0-or-later AND MIT"], False),
        (["MIT License", "GNU General Public License v3 (GPLv3)"], False),
        (["GPL-2.0-only WITH Classpath-exception-2.0"], False),
        (["Proprietary"], False),
        (["Dual License"], False),
        (["All rights reserved by Acme"], False),
        ([""], False),
        ([], False),
    ],
)
def test_an_unknown_licence_is_a_problem_that_names_the_distribution_and_the_remedy(
    licences: list[str], allowed: bool
) -> None:
    problem = problem_of("acme-client", licences)
    assert (problem is None) is allowed
    if problem is not None:
        assert problem.startswith("acme-client: ")
        assert "remove the dependency" in problem


def test_the_encoders_of_the_sandbox_are_in_no_deployment() -> None:
    """The wheel of `av` has FFmpeg (LGPL), x264 and x265 (GPL) beside what its metadata states (BSD)."""
    for pins in ("infra/requirements.txt", "infra/aws/requirements.txt"):
        assert not re.search(r"^av==", (ROOT / pins).read_text(), re.MULTILINE)
