"""Preflight: checks a request and its media against the limits of its vendors, before anything is sent."""

import asyncio

import httpx
import msgspec

from submitter.clock import Clock
from submitter.errors import InvalidRequest, Problem
from submitter.media.check import MediaFacts, check_media
from submitter.media.probe import Medium, open_medium, probe
from submitter.request import (
    Limits,
    MotionControl,
    check_request,
    check_source,
    check_types,
    suggest_vendors,
)
from submitter.settings import Settings
from submitter.stored_request import to_stored
from submitter.vendors.registry import limits_by_vendor


class Prepared(msgspec.Struct, frozen=True):
    """A request that passed preflight.

    `vendors` can process it. `formats` holds the media formats by field (`image`, `video`), and
    `stored_request` the request as the ledger stores it. `warnings` lists skipped checks and vendors.
    """

    request: MotionControl
    vendors: tuple[str, ...]
    external_task_id: str
    image: Medium
    video: Medium
    formats: dict[str, str]
    stored_request: dict[str, str]
    warnings: tuple[str, ...]


async def preflight(request: MotionControl, settings: Settings, client: httpx.AsyncClient, clock: Clock) -> Prepared:
    """Check a request and its media against the limits of each of its vendors.

    A vendor that cannot process it is left out, with a warning. If none can, raise InvalidRequest with
    every problem and the vendors that do not have it.
    """
    problems, request = check_types(request)
    mistyped = {problem.field.partition("[")[0] for problem in problems}
    known = limits_by_vendor()
    if "vendor" in mistyped or not request.vendors:
        if "vendor" not in mistyped:
            limit = f"one or more of {', '.join(known)}"
            problems.append(Problem("vendor", repr(request.vendor), limit, "Name a vendor."))
        raise InvalidRequest(problems)
    limits = {}
    for name in request.vendors:
        try:
            limits[name] = settings.require_vendor(name).vendor.limits
        except InvalidRequest as unknown:
            problems.extend(unknown.problems)
    first = next(iter(limits), next(iter(known)))
    image = open_medium("image", request.image, inline=True)
    video = open_medium("video", request.video, inline=False)
    problems.extend(medium for medium in (image, video) if isinstance(medium, Problem) and medium.field not in mistyped)
    media = [medium for medium in (image, video) if isinstance(medium, Medium)]
    probes = {medium.field: await probe(medium, client) for medium in media}
    for found in probes.values():
        problems.extend(found.problems)
    facts = {field: found.facts for field, found in probes.items()}
    has_store = settings.media_store is not None
    wrong = {
        name: [
            problem
            for problem in _problems(request, media, facts, vendor_limits, has_store=has_store)
            if problem.field not in mistyped
        ]
        for name, vendor_limits in (known | limits).items()
    }
    able = tuple(name for name in limits if not wrong[name])
    if problems or not able or isinstance(image, Problem) or isinstance(video, Problem):
        raise InvalidRequest([*problems, *suggest_vendors(wrong[first], wrong)])
    try:
        stored_request = await asyncio.to_thread(to_stored, request, image, video)
    except OSError as error:
        raise InvalidRequest([Problem("image or video", str(error), "a readable file", "Check the file.")]) from error
    return Prepared(
        request=request,
        vendors=able,
        external_task_id=request.external_task_id or clock.new_id(),
        image=image,
        video=video,
        formats={field: found.format for field, found in facts.items() if found and found.format},
        stored_request=stored_request,
        warnings=(
            *(found.warning for found in probes.values() if found.warning),
            *(f"{name} is left out: {wrong[name][0]}" for name in limits if wrong[name]),
        ),
    )


def _problems(
    request: MotionControl,
    media: list[Medium],
    facts: dict[str, MediaFacts | None],
    limits: Limits,
    *,
    has_store: bool,
) -> list[Problem]:
    """Return the problems of a request at one vendor."""
    return [
        *check_request(request, limits),
        *(
            problem
            for medium in media
            for problem in check_source(medium.field, medium.kind, limits, has_store=has_store)
        ),
        *check_media(request, limits, facts.get("image"), facts.get("video")),
    ]
