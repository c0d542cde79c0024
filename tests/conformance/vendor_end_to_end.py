"""Conformance of a vendor adapter with its stand-in, end to end over real HTTP, with faults."""

import contextlib
from pathlib import Path
from typing import Any, ClassVar

import pytest

from submitter.clock import Clock
from submitter.errors import InvalidRequest, SubmissionUnknown, VendorRefused
from submitter.http import VendorHttp
from submitter.sandbox.faults import Faults
from submitter.task import TaskStatus
from submitter.vendors.base import HttpAnswer
from tests.world import World, run_many


class EndToEnd:
    """Submits tasks to the stand-in; injects faults."""

    vendor: ClassVar[str]

    async def test_a_task_succeeds_end_to_end(self, world: World, media: Path) -> None:
        sandbox = world.stand_in(self.vendor)
        await world.start()
        task = await world.submitter.submit(world.request(vendor=self.vendor, metadata={"order": "42"}))
        done = await task.result(timeout=60)
        assert (done.status, done.vendor) == (TaskStatus.SUCCEED, self.vendor)
        assert done.videos[0].url.startswith(sandbox.base_url)
        while "task.succeed" not in [event["type"] for event in world.inbox.events]:
            await world.inbox.until(len(world.inbox.requests) + 1)
        (event,) = [event for event in world.inbox.events if event["type"] == "task.succeed"]
        assert event["source"] == f"/kling-relay/{self.vendor}"
        assert event["data"]["task_id"] == next(iter(sandbox.jobs))
        assert sandbox.counts["created"] == 1

    async def test_a_failed_task_has_the_reason(self, world: World) -> None:
        world.stand_in(self.vendor)
        world.faults(fail=1, fail_reason="no person in the video")
        await world.start()
        done = await (await world.submitter.submit(world.request(vendor=self.vendor))).result(timeout=60)
        assert (done.status, done.status_message) == (TaskStatus.FAILED, "no person in the video")

    async def test_a_lost_answer_to_create_never_creates_a_second_task(self, world: World) -> None:
        sandbox = world.stand_in(self.vendor)
        await world.start()
        adapter = world.settings.common.vendors[self.vendor].vendor
        for number, fault in enumerate(({"create_5xx": 1.0}, {"create_never": 1.0})):
            world.faults(**fault)
            world.create_with(VendorHttp(answer_timeout_s=1))
            request = world.request(vendor=self.vendor, external_task_id=f"order-{number}")
            if adapter.limits.own_id:
                await world.submitter.submit(request)
            else:
                with contextlib.suppress(SubmissionUnknown):  # not raised if a callback comes before the timeout
                    await world.submitter.submit(request)
                world.faults()
                with contextlib.suppress(SubmissionUnknown):  # submitting again does not send again
                    await world.submitter.submit(request)
                if not adapter.callbacks:  # no callback settles it, so an operator assigns the task
                    await world.submitter.adopt(f"order-{number}", list(sandbox.jobs)[number])
            task = await world.submitter.task(f"order-{number}")
            done = await task.result(timeout=60)
            assert done.status is TaskStatus.SUCCEED
            assert sandbox.counts["created"] == number + 1

    @pytest.mark.parametrize("kind", ["balance", "permission"])
    async def test_a_definite_refusal_fails_over_to_the_next_vendor(self, world: World, kind: Any) -> None:
        first, second = world.stand_in(self.vendor), world.stand_in(self._other())
        await world.start()
        first.set_faults(Faults(refuse=kind))
        second.pace_s = 30  # skipped below: its first status is observed on any machine
        task = await world.submitter.submit(world.request(vendor=f"{self.vendor},{self._other()}"))
        assert task.task.vendor == self._other()
        assert task.task.refused_by[0].vendor == self.vendor
        assert f"refused by {self.vendor}" in task.task.status_message
        assert (await world.skip_to_end(task)).status is TaskStatus.SUCCEED
        assert (first.counts["created"], second.counts["created"]) == (0, 1)

    async def test_an_ambiguous_create_does_not_fail_over(self, world: World) -> None:
        first, second = world.stand_in(self.vendor), world.stand_in(self._other())
        await world.start()
        first.set_faults(Faults(create_5xx=1))
        request = world.request(vendor=f"{self.vendor},{self._other()}", external_task_id="order-1")
        with contextlib.suppress(SubmissionUnknown):
            await world.submitter.submit(request)
        assert (await world.submitter.task("order-1")).task.vendor == self.vendor
        assert (first.counts["created"], second.counts["created"]) == (1, 0)

    async def test_a_wrong_key_is_refused_with_a_remedy(self, world: World) -> None:
        sandbox = world.stand_in(self.vendor)
        world.environ[f"{self.vendor.upper()}_API_KEY"] = "wrong"
        await world.start()
        with pytest.raises(VendorRefused, match="API") as refused:
            await world.submitter.submit(world.request(vendor=self.vendor))
        assert not refused.value.retryable
        assert sandbox.counts["created"] == 0
        configured = world.settings.common.vendors[self.vendor].vendor
        http = VendorHttp()
        probed = await http.run(configured.probe(Clock().now_s()))
        assert isinstance(probed, HttpAnswer)
        with pytest.raises(VendorRefused):
            configured.read_probe(probed)
        await http.close()

    async def test_a_valid_key_passes_the_probe(self, world: World) -> None:
        world.stand_in(self.vendor)
        await world.start(receiver=False)
        configured = world.settings.common.vendors[self.vendor].vendor
        http = VendorHttp()
        probed = await http.run(configured.probe(Clock().now_s()))
        assert isinstance(probed, HttpAnswer)
        assert configured.read_probe(probed)
        await http.close()

    async def test_an_unsupported_field_is_refused_and_other_vendors_are_suggested(self, world: World) -> None:
        sandbox = world.stand_in(self.vendor)
        await world.start(receiver=False)
        adapter = world.settings.common.vendors[self.vendor].vendor
        limits = adapter.limits
        fields: dict[str, Any] = {
            "negative_prompt": "rain", "element_id": "829836802793406551", "watermark": True, "model": "kling-v2-6",
        }  # fmt: skip
        is_supported = {
            "negative_prompt": bool(limits.negative_prompt_chars), "element_id": bool(limits.element_models),
            "watermark": limits.watermark, "model": "kling-v2-6" in limits.models,
        }  # fmt: skip
        for field, value in fields.items():
            request = world.request(vendor=self.vendor, **{field: value})
            if is_supported[field]:
                await world.submitter.prepare(request)
                continue
            with pytest.raises(InvalidRequest) as refused:
                await world.submitter.prepare(request)
            (problem,) = refused.value.problems
            assert problem.field == field
            assert "Or use" in problem.remedy
        assert sandbox.counts["created"] == 0

    @pytest.mark.slow
    async def test_two_hundred_tasks_with_faults_all_succeed_and_none_is_created_twice(self, world: World) -> None:
        await run_many(world, 200, self.vendor)

    def _other(self) -> str:
        return "kling" if self.vendor != "kling" else "novita"
