"""A sixth vendor, in a package of its own that is found by its entry point; nothing here is changed for it."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from submitter import installed
from submitter.errors import InvalidSettings
from submitter.task import TaskStatus
from tests.conftest import World
from tests.road.test_processes import cli

ACME = '''
"""A vendor as another package adds it: its adapter, its setup, its stand-in."""

from dataclasses import dataclass
from typing import ClassVar

from msgspec.structs import replace
from starlette.responses import JSONResponse

from submitter.sandbox.base import Sandbox
from submitter.sandbox.studio import Asked, MediaRules
from submitter.schedule import Backoff, Patience
from submitter.task import Report, TaskStatus, Video
from submitter.vendors.base import (
    Findings, Query, VendorSetup, json_request, object_or_empty, read_object, refusal, refused_create, rule_of, text,
)
from submitter.vendors.kling import LIMITS_V1

WORDS = {"new": TaskStatus.SUBMITTED, "busy": TaskStatus.PROCESSING, "good": TaskStatus.SUCCEED}


@dataclass(frozen=True)
class Acme:
    key: str
    base_url: str = "https://acme.example.com"
    name: ClassVar = "acme"
    limits: ClassVar = replace(LIMITS_V1, source="Acme", own_id=False, watermark=False)
    patience: ClassVar = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
    callbacks: ClassVar = True
    signs_callbacks: ClassVar = False

    def create(self, job, now_s):
        body = {"image": job.image, "video": job.video, "facing": job.request.character_orientation,
                "tell": job.callback_url}
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
        return Report(source, WORDS[job["state"]], text(job, "job"), videos=videos)

    def probe(self, now_s):
        return json_request("GET", self.base_url + "/jobs/0", self.key)

    def read_probe(self, answer):
        return "fine"


class AcmeSandbox(Sandbox):
    name = "acme"

    def routes(self):
        return [self.route("/jobs", self.make, "POST"), self.route("/jobs/{id}", self.show, "GET")]

    def refuse(self, refusal):
        return JSONResponse({}, 400)

    def tells(self, job):
        words = {"submitted": "new", "processing": "busy", "succeeded": "good"}
        return {"job": job.id, "state": words[job.status], "url": "" if job.is_open else self.result_url(job)}

    async def make(self, request):
        body = await self.json(request)
        job = await self.create(
            Asked(image=body["image"], video=body["video"], orientation=body["facing"], callback_url=body["tell"]),
            MediaRules(),
        )
        return {"job": job.id}

    async def show(self, request):
        return self.tells(self.asked_about(request.path_params["id"]))


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
    """A folder of installed packages, in which one adds the vendor `acme`."""
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
    installed.vendors.cache_clear()
    yield folder
    installed.vendors.cache_clear()
    sys.modules.pop("acme_kling", None)


async def test_a_vendor_of_another_package_goes_the_whole_road(packages: Path, world: World) -> None:
    acme = world.stand_in("acme")
    await world.start()
    done = await (await world.submitter.submit(world.request(vendor="acme"))).result(timeout=20)
    assert (done.status, done.vendor) == (TaskStatus.SUCCEED, "acme")
    assert acme.counts["created"] == 1
    assert acme.counts["queries"] == 1  # unsigned, so its end is asked about before it is believed


async def test_the_command_line_knows_it(packages: Path, world: World) -> None:
    await world.start(receiver=False)
    environ = world.environ | {"ACME_API_KEY": "k", "ACME_BASE_URL": "http://127.0.0.1:9", "MORE_PATH": str(packages)}
    shown = msgspec.json.decode((await cli(environ, "vendors", "--json")).out)
    assert (shown["acme"]["credentials"], shown["acme"]["watermark"]) == ("set", "no")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("kling = acme_kling:SETUP", "its name must be of its own"),
        ("acme = acme_kling:Acme", "and not a VendorSetup"),
        ("acme = acme_missing:SETUP", "cannot be imported"),
        ("other = acme_kling:SETUP", "calls itself 'acme'"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_named(packages: Path, line: str, says: str) -> None:
    (packages / "acme_kling-1.0.dist-info" / "entry_points.txt").write_text(f"[kling_relay.vendors]\n{line}\n")
    with pytest.raises(InvalidSettings, match="Mend or remove the package") as wrong:
        installed.vendors()
    assert says in str(wrong.value)
