"""End-to-end test of a vendor plugin: another package that is found by its entry point."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from submitter.errors import InvalidSettings
from submitter.task import TaskStatus
from submitter.vendors import registry
from tests.road.test_processes import cli
from tests.world import World

ACME = '''
"""A vendor plugin: adapter, setup and stand-in."""

from dataclasses import dataclass
from typing import ClassVar

import msgspec
from msgspec.structs import replace
from starlette.responses import JSONResponse

from submitter.sandbox.base import Sandbox
from submitter.sandbox.studio import MediaRules, RenderRequest
from submitter.schedule import Backoff, PollPolicy
from submitter.task import TaskStatus, Video
from submitter.observation import Report
from submitter.vendors.base import Findings, Query, VendorSetup
from submitter.vendors.reading import object_or_empty, read_object, text
from submitter.vendors.refusals import refusal, refused_create, rule_of
from submitter.vendors.rest import json_request
from submitter.vendors.kling.v1 import LIMITS

STATUS = {"new": TaskStatus.SUBMITTED, "busy": TaskStatus.PROCESSING, "good": TaskStatus.SUCCEED}


@dataclass(frozen=True)
class Acme:
    key: str
    base_url: str = "https://acme.example.com"
    name: ClassVar = "acme"
    limits: ClassVar = replace(LIMITS, source="Acme", own_id=False, watermark=False)
    poll_policy: ClassVar = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
    callbacks: ClassVar = True
    signs_callbacks: ClassVar = False

    def create(self, request, now_s):
        body = {"image": request.image, "video": request.video, "facing": request.request.character_orientation,
                "notify": request.callback_url}
        return json_request("POST", self.base_url + "/jobs", self.key, body)

    def read_create(self, answer):
        if answer.status != 200:
            rule = rule_of(answer.status, "acme")
            raise refused_create(refusal("acme", answer, rule, code="none", message=""), rule)
        return Report("create", TaskStatus.SUBMITTED, text(object_or_empty(answer.body), "job"))

    def queries(self, tasks, now_s):
        known = [task for task in tasks if task.task_id]
        return [Query(json_request("GET", f"{self.base_url}/jobs/{t.task_id}", self.key), (t,)) for t in known]

    def read_query(self, query, answer, now_s):
        return Findings({query.tasks[0].external_task_id: self.read(answer.body, "poll")})

    def read_callback(self, body, now_s):
        return self.read(body, "callback")

    def read(self, body, source):
        job = read_object(body)
        videos = (Video(job["url"]),) if job.get("url") else ()
        return Report(source, STATUS[job["state"]], text(job, "job"), videos=videos)

    def probe(self, now_s):
        return json_request("GET", self.base_url + "/jobs/0", self.key)

    def read_probe(self, answer):
        return "fine"


class Make(msgspec.Struct):
    image: str
    video: str
    facing: str
    notify: str | None = None


class AcmeSandbox(Sandbox):
    name = "acme"

    def routes(self):
        return [self.route("/jobs", self.make, "POST"), self.route("/jobs/{id}", self.show, "GET")]

    def refuse(self, refusal):
        return JSONResponse({}, 400)

    def callback_body(self, job):
        states = {"submitted": "new", "processing": "busy", "succeeded": "good"}
        return {"job": job.id, "state": states[job.status], "url": "" if job.is_open else self.result_url(job)}

    async def make(self, request):
        body = await self.body(request, Make)
        job = await self.create(
            RenderRequest(image=body.image, video=body.video, orientation=body.facing, callback_url=body.notify),
            MediaRules(),
        )
        return {"job": job.id}

    async def show(self, request):
        return self.callback_body(self.queried_job(request.path_params["id"]))


SETUP = VendorSetup(
    names=("api_key", "base_url"),
    credentials_remedy="Set ACME_API_KEY.",
    reader=Acme(""),
    configure=lambda settings: Acme(settings["api_key"], settings["base_url"]) if settings.get("api_key") else None,
    sandbox="acme_kling:AcmeSandbox",
)
'''


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages; one adds the vendor `acme`."""
    folder = tmp_path / "site"
    (folder / "acme_kling-1.0.dist-info").mkdir(parents=True)
    (folder / "acme_kling-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-kling\nVersion: 1.0\n"
    )
    (folder / "acme_kling-1.0.dist-info" / "entry_points.txt").write_text(
        "[kling_relay.vendors]\nacme = acme_kling:SETUP\n"
    )
    (folder / "acme_kling.py").write_text(ACME)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    registry.vendors.cache_clear()
    yield folder
    registry.vendors.cache_clear()
    sys.modules.pop("acme_kling", None)


async def test_a_vendor_plugin_works_end_to_end(packages: Path, world: World) -> None:
    acme = world.stand_in("acme")
    await world.start()
    done = await (await world.submitter.submit(world.request(vendor="acme"))).result(timeout=60)
    assert (done.status, done.vendor) == (TaskStatus.SUCCEED, "acme")
    assert acme.counts["created"] == 1
    assert acme.counts["queries"] == 1  # its callback is unsigned, so a poll confirms the final status


async def test_the_command_line_lists_a_vendor_plugin(packages: Path, world: World) -> None:
    await world.start(receiver=False)
    environ = world.environ | {"ACME_API_KEY": "k", "ACME_BASE_URL": "http://127.0.0.1:9", "MORE_PATH": str(packages)}
    shown = msgspec.json.decode((await cli(environ, "vendors", "--json")).out)
    assert (shown["acme"]["credentials"], shown["acme"]["watermark"]) == ("set", "no")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kling = acme_kling:SETUP", "its name is taken"),
        ("acme = acme_kling:Acme", "not a VendorSetup"),
        ("acme = acme_missing:SETUP", "cannot be imported"),
        ("other = acme_kling:SETUP", "the vendor's name 'acme'"),
    ],
)
def test_an_invalid_entry_point_is_reported(packages: Path, line: str, message: str) -> None:
    (packages / "acme_kling-1.0.dist-info" / "entry_points.txt").write_text(f"[kling_relay.vendors]\n{line}\n")
    with pytest.raises(InvalidSettings, match="Update, correct or remove the package") as wrong:
        registry.vendors()
    assert message in str(wrong.value)
