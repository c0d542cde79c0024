"""The sandbox enforces Kling's documented limits and errors. A permissive stand-in would prove nothing."""

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from submitter.sandbox.base import API_KEY
from submitter.sandbox.media import inspect, make_video, render
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
        {"id": ""},
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
