"""The sandbox enforces Kling's documented limits and errors. A permissive stand-in would prove nothing."""

import base64
import io
from typing import Any

import httpx
import msgspec
import pytest
from PIL import Image

from submitter.sandbox.base import API_KEY, Job
from submitter.sandbox.media import inspect, make_video, render
from submitter.sandbox.studio import RenderRequest
from submitter.vendors.kling.credentials import KeyPair
from tests.world import World

AUTH = {"authorization": f"Bearer {API_KEY}"}


def image(width: int = 400, height: int = 600, format: str = "PNG") -> str:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, format)
    return base64.b64encode(out.getvalue()).decode()


def body(world: World, **changes: Any) -> dict[str, Any]:
    fields = {
        "image": image(), "video": f"{world.hook_url}/files/dance.mp4", "orientation": "video", "prompt": "x",
        "resolution": "720p", "elements": [], "id": "order-1",
    } | changes  # fmt: skip
    contents = [
        {"type": "prompt", "text": fields["prompt"]},
        {"type": "image", "url": fields["image"]},
        {"type": "video", "url": fields["video"]},
        *({"type": "element", "element_id": element, "id": "element_1"} for element in fields["elements"]),
    ]
    settings = {"character_orientation": fields["orientation"], "resolution": fields["resolution"]}
    return {"contents": contents, "settings": settings, "options": {"external_task_id": fields["id"]}}


async def create(world: World, client: httpx.AsyncClient, model: str = "kling-3.0", **changes: Any) -> httpx.Response:
    url = f"{world.sandbox_url}/motion-control/{model}"
    return await client.post(url, json=body(world, **changes), headers=AUTH)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": image(299, 400)},
        {"image": image(400, 1001)},
        {"image": image(format="WEBP")},
        {"image": "data:image/png;base64," + image()},
        {"image": "not base64!"},
        {"image": None},
        {"video": None},
        {"orientation": None},
        {"orientation": "sideways"},
        {"resolution": "4k"},
        {"prompt": "x" * 2501},
        {"elements": ["1", "2"]},
        {"elements": ["1"], "orientation": "image"},
    ],
)
async def test_request_outside_the_limits_is_refused(
    world: World, client: httpx.AsyncClient, changes: dict[str, Any]
) -> None:
    await world.start(receiver=False)
    refused = await create(world, client, **changes)
    assert (refused.status_code, refused.json()["code"]) == (400, 1201)
    assert world.kling.jobs == {}


async def test_video_too_short_or_too_long_for_its_orientation_is_refused(
    world: World, client: httpx.AsyncClient
) -> None:
    await world.start(receiver=False)
    for seconds, orientation in ((2, "video"), (11, "image")):
        (world.media / "other.mp4").write_bytes(make_video(seconds, 360, 360))
        refused = await create(world, client, video=f"{world.hook_url}/files/other.mp4", orientation=orientation)
        assert f"video of {seconds}" in refused.json()["message"]
    (world.media / "other.mp4").unlink()


async def test_errors_follow_the_documented_table(world: World, client: httpx.AsyncClient) -> None:
    world.kling.slots = 1
    world.kling.pace_s = 5
    await world.start(receiver=False)
    assert (await create(world, client)).json()["data"]["status"] == "submitted"
    assert (await create(world, client)).json()["message"] == "External_task_id order-1 already exists"
    full = await create(world, client, id="order-2")
    assert (full.status_code, full.json()["code"]) == (429, 1303)
    assert (await create(world, client, model="kling-9")).json()["code"] == 1203
    old = f"{world.sandbox_url}/v1/videos/motion-control"
    expired = KeyPair("sandbox-access", "sandbox-secret").token(0)
    wrong = KeyPair("sandbox-access", "wrong").token(4e9)
    for url, header, code in (
        (old, None, 1001),
        (old, "Basic x", 1002),
        (old, "Bearer x", 1002),
        (old, f"Bearer {wrong}", 1000),
        (old, f"Bearer {expired}", 1004),
        (old, f"Bearer {KeyPair('sandbox-access', 'sandbox-secret').token(4e9)}", 1003),
        (f"{world.sandbox_url}/tasks?task_ids=1", f"Bearer {expired}", 1002),  # v2 takes API keys only
    ):
        answer = await client.get(url, headers={} if header is None else {"authorization": header})
        assert (answer.status_code, answer.json()["code"]) == (401, code)


async def test_tasks_are_queried_by_id_in_batches_and_listed_in_pages(world: World, client: httpx.AsyncClient) -> None:
    await world.start(receiver=False)
    ids = [(await create(world, client, id=f"order-{i}")).json()["data"]["id"] for i in range(5)]

    async def tasks(query: str) -> Any:
        return (await client.get(f"{world.sandbox_url}/tasks?{query}", headers=AUTH)).json()

    assert [task["id"] for task in (await tasks(f"task_ids={ids[1]},{ids[0]},9"))["data"]] == [ids[1], ids[0]]
    assert [task["id"] for task in (await tasks("external_task_ids=order-3"))["data"]] == [ids[3]]
    assert (await tasks("task_ids=9"))["data"] == []
    assert (await tasks("task_ids=1&external_task_ids=2"))["code"] == 1201
    assert (await tasks("task_ids=" + ",".join("1" * 21)))["code"] == 1201
    first = (await client.post(f"{world.sandbox_url}/tasks", json={"limit": 3}, headers=AUTH)).json()["data"]
    assert (first["count"], first["has_more"]) == (3, True)
    cursor = {"limit": 3, "cursor": first["next_cursor"]}
    second = (await client.post(f"{world.sandbox_url}/tasks", json=cursor, headers=AUTH)).json()["data"]
    assert [task["id"] for task in (*first["result"], *second["result"])] == ids
    old = f"{world.sandbox_url}/v1/videos/motion-control?pageNum=1&pageSize=2"
    assert [task["task_id"] for task in (await client.get(old, headers=AUTH)).json()["data"]] == [ids[4], ids[3]]


async def test_result_url_expires(world: World) -> None:
    world.faults(expire_s=0)
    await world.start()
    done = await (await world.submitter.submit(world.request())).result(timeout=60)
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(done.videos[0].url)
    assert answer.status_code == 403


async def test_faults_are_set_at_runtime_and_an_unknown_one_is_rejected(
    world: World, client: httpx.AsyncClient
) -> None:
    await world.start(receiver=False)
    url = f"{world.sandbox_url}/sandbox/faults"
    assert (await client.post(url, json={"drop": 0.5})).json()["drop"] == 0.5
    wrong = await client.post(url, json={"dropp": 1})
    assert wrong.status_code == 400
    assert "Faults are drop, repeat" in wrong.json()["error"]


@pytest.mark.parametrize(("resolution", "side"), [("720p", 720), ("1080p", 1080)])
@pytest.mark.parametrize("sound", [True, False])
def test_result_is_playable_with_the_requested_size_length_and_sound(resolution: str, side: int, sound: bool) -> None:
    import av

    picture = base64.b64decode(image(400, 600))
    data, duration_s = render(picture, make_video(4, 480, 360), resolution=resolution, sound=sound, limit_s=3)
    facts = inspect(data)
    assert (facts.width, facts.height) == (side, side * 3 // 2)
    assert duration_s == pytest.approx(3, abs=0.1)
    with av.open(io.BytesIO(data), "r") as played:
        assert bool(played.streams.audio) is sound
        assert sum(1 for _ in played.decode(video=0)) == round(duration_s * 24)


async def test_an_empty_external_task_id_is_absent(world: World, client: httpx.AsyncClient) -> None:
    await world.start(receiver=False)
    answers = [await create(world, client, id="") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert world.kling.by_external_id == {}


WRONG_SHAPES: list[Any] = [
    [], 5, None, "text", {}, {"contents": 5}, {"contents": [5]}, {"contents": [{"type": 5}]},
    {"contents": [], "settings": []}, {"contents": [], "settings": {"character_orientation": {}}},
    {"contents": [], "settings": {"character_orientation": "video"}, "options": "x"},
    {"contents": [{"type": "image", "url": {}}], "settings": {"character_orientation": "video"}},
    {"contents": [], "settings": {"character_orientation": "video"}, "options": {"watermark_info": 1}},
    {"contents": [], "settings": {"character_orientation": "video"}, "options": {"callback_url": 7}},
]  # fmt: skip


@pytest.mark.parametrize("path", ["/motion-control/kling-3.0", "/v1/videos/motion-control", "/tasks"])
async def test_a_wrong_shape_is_invalid_and_never_a_plain_500(
    world: World, client: httpx.AsyncClient, path: str
) -> None:
    await world.start(receiver=False)
    valid_list: list[Any] = [{}] if path == "/tasks" else []
    for shape in [shape for shape in WRONG_SHAPES if shape not in valid_list]:
        content = msgspec.json.encode(shape)
        refused = await client.post(f"{world.sandbox_url}{path}", content=content, headers=AUTH)
        if path == "/tasks" and isinstance(shape, dict):  # a list ignores unknown fields
            assert refused.status_code == 200
            continue
        assert (refused.status_code, refused.json()["code"]) == (400, 1201), shape
    for wrong in ({"limit": 501}, {"limit": "5"}, {"cursor": "x"}, {"start_time": 5}, {"filters": [1]}):
        if path == "/tasks":
            refused = await client.post(f"{world.sandbox_url}{path}", json=wrong, headers=AUTH)
            assert (refused.status_code, refused.json()["code"]) == (400, 1201), wrong


@pytest.mark.parametrize("prefix", ["", "/kling"])
async def test_unknown_paths_and_methods_get_klings_envelope(
    world: World, client: httpx.AsyncClient, prefix: str
) -> None:
    await world.start(receiver=False)
    url = world.sandbox_url + prefix
    unknown = await client.post(f"{url}/v1/videos/text2video", json={}, headers=AUTH)
    assert (unknown.status_code, unknown.json()["code"]) == (404, 1203)
    assert "/v1/videos/text2video" in unknown.json()["message"]
    wrong = await client.delete(f"{url}/v1/videos/motion-control/1", headers=AUTH)
    assert (wrong.status_code, wrong.json()["code"]) == (404, 1202)
    assert "DELETE" in wrong.json()["message"]
    assert {"code", "message", "request_id"} == set(wrong.json())


async def test_a_list_of_tasks_has_100_by_default(world: World, client: httpx.AsyncClient) -> None:
    await world.start(receiver=False)
    for n in range(101):
        job = Job(str(n), RenderRequest(image="i", video="v", orientation="video"), 2, world.clock.now_ms())
        world.kling.jobs[job.id] = job
    listed = (await client.post(f"{world.sandbox_url}/tasks", json={}, headers=AUTH)).json()["data"]
    assert (listed["count"], listed["has_more"]) == (100, True)


async def test_novitas_test_mode_sends_a_mock_event_and_renders_nothing(
    world: World, client: httpx.AsyncClient
) -> None:
    novita = world.stand_in("novita")
    await world.start(receiver=False)
    webhook = {
        "url": f"{world.hook_url}/novita",
        "test_mode": {"enabled": True, "return_task_status": "TASK_STATUS_FAILED"},
    }
    asked = {
        "image": "i", "video": "v", "model_name": "kling-v3-0-std", "character_orientation": "video",
        "extra": {"webhook": webhook},
    }  # fmt: skip
    made = await client.post(f"{world.sandbox_url}/novita/v3/async/kling-v3.0-motion-control", json=asked, headers=AUTH)
    await world.inbox.until(1)
    event = world.inbox.events[0]
    assert event["event_type"] == "ASYNC_TASK_RESULT"
    assert event["payload"]["task"]["status"] == "TASK_STATUS_FAILED"
    assert event["payload"]["task"]["task_id"] == made.json()["task_id"]
    assert novita.jobs == {}


async def test_oxen_takes_elements_and_checks_media_only_when_the_job_runs(
    world: World, client: httpx.AsyncClient
) -> None:
    oxen = world.stand_in("oxen")
    await world.start(receiver=False)
    asked = {
        "model": "kling-video-v3-pro-motion-control", "prompt": "@Element1 dances", "input_video": "http://127.0.0.1:9/",
        "input_image": "http://127.0.0.1:9/", "elements": [{"frontal_image_url": "https://example.com/a.png"}],
    }  # fmt: skip
    url = f"{world.sandbox_url}/oxen/api/ai/queue"
    made = await client.post(url, json=asked, headers=AUTH)
    assert made.status_code == 200
    (job,) = oxen.jobs.values()
    await world.clock.skip_until(lambda: not job.is_open)
    assert (job.status, "cannot be fetched" in job.message) == ("failed", True)
    assert (await client.get(url, headers=AUTH)).json() == {"count": 0, "generations": []}  # active ones only
    wrongs: list[dict[str, Any]] = [
        {"elements": [{}, {}]}, {"character_orientation": "image"}, {"elements": [5]}, {"prompt": ""},
    ]  # fmt: skip
    for wrong in wrongs:
        assert (await client.post(url, json=asked | wrong, headers=AUTH)).status_code == 400
