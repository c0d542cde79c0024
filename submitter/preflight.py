"""What happens before money is spent: a request and its media against the limits of each of its vendors."""

import asyncio

import httpx
import msgspec

from submitter.asked import asked_of
from submitter.clock import Clock
from submitter.errors import InvalidRequest, Problem
from submitter.installed import limits as installed_limits
from submitter.media import Medium, open_medium, probe
from submitter.request import (
    Limits,
    MediaFacts,
    MotionControl,
    check_media,
    check_request,
    check_source,
    name_who_can,
)
from submitter.settings import Settings


class Prepared(msgspec.Struct, frozen=True):
    """A request that passed preflight: the vendors that can do it, its id, its media with their
    formats by field, what was asked for, and what was not checked.
    """

    request: MotionControl
    vendors: tuple[str, ...]
    external_task_id: str
    image: Medium
    video: Medium
    formats: dict[str, str]
    asked: dict[str, str]
    warnings: tuple[str, ...]


async def preflight(request: MotionControl, settings: Settings, client: httpx.AsyncClient, clock: Clock) -> Prepared:
    """Check a request and its media against the limits of each of its vendors.

    A vendor that cannot do it is left out, with a warning; when none can, InvalidRequest
    names every problem, and who can.
    """
    if not request.vendors:
        known = ", ".join(installed_limits())
        raise InvalidRequest([Problem("vendor", repr(request.vendor), f"of {known}", "Name one, or several.")])
    limits = {name: settings.require_vendor(name).vendor.limits for name in request.vendors}
    image = open_medium("image", request.image, inline=True)
    video = open_medium("video", request.video, inline=False)
    problems = [medium for medium in (image, video) if isinstance(medium, Problem)]
    media = [medium for medium in (image, video) if isinstance(medium, Medium)]
    probes = {medium.field: await probe(medium, client) for medium in media}
    for found in probes.values():
        problems.extend(found.problems)
    facts = {field: found.facts for field, found in probes.items()}
    wrong = {
        name: _problems(request, media, facts, theirs, has_store=settings.media_store is not None)
        for name, theirs in (installed_limits() | limits).items()
    }
    able = tuple(name for name in request.vendors if not wrong[name])
    if problems or not able or isinstance(image, Problem) or isinstance(video, Problem):
        raise InvalidRequest([*problems, *name_who_can(wrong[request.vendors[0]], wrong)])
    return Prepared(
        request=request,
        vendors=able,
        external_task_id=request.external_task_id or clock.new_id(),
        image=image,
        video=video,
        formats={field: found.format for field, found in facts.items() if found and found.format},
        asked=await asyncio.to_thread(asked_of, request, image, video),
        warnings=(
            *(found.warning for found in probes.values() if found.warning),
            *(f"{name} is left out: {wrong[name][0]}" for name in request.vendors if wrong[name]),
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
    """Return what is wrong with a request at one vendor."""
    return [
        *check_request(request, limits),
        *(
            problem
            for medium in media
            for problem in check_source(medium.field, medium.kind, limits, has_store=has_store)
        ),
        *check_media(request, limits, facts.get("image"), facts.get("video")),
    ]
