"""The Lambda functions under AWS's runtime client, with AWS's documented events and a stand-in Runtime API."""

import base64
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from submitter.ledger import Ledger, open_ledger
from submitter.sandbox.server import free_socket
from submitter.task import TaskStatus
from tests.bench import servers
from tests.conftest import needs
from tests.road.fan_out import complete_task
from tests.road.lambda_runtime import InvocationFailed, LambdaRuntime, answer_of, aws_event, lambda_function
from tests.road.many_processes import fill
from tests.world import KEY, World

RECEIVER, SUBMITTER = "receiver.aws_lambda.receive.handler", "submitter.aws_lambda.handler"
HTTP = ["http_api_v2", "http_api_v2_stage", "rest_api_v1", "function_url", "alb", "alb_multi"]


@pytest.fixture(autouse=True)
def _needs_the_client() -> None:
    needs("awslambdaric (Linux)", is_there=sys.platform == "linux")


@pytest.fixture
async def dynamo(dynamodb_url: str) -> AsyncIterator[Ledger]:
    """Open the ledger that the function uses."""
    ledger = open_ledger(dynamodb_url)
    yield ledger
    await ledger.close()


@asynccontextmanager
async def function(world: World, handler: str, ledger_url: str, **environ: str) -> AsyncIterator[LambdaRuntime]:
    """Run a function whose ledger is at `ledger_url`."""
    world.environ |= {
        "KLING_RELAY_LEDGER": ledger_url,
        "KLING_RELAY_KEYS": f"bench:{KEY}",
        "KLING_RELAY_PUBLIC_URL": "https://relay.example.com",
        "KLING_RELAY_POLL_AFTER_S": "900",
        **environ,
    }
    await world.start(receiver=False)
    async with lambda_function(handler, world.environ, world.folder) as runtime:
        yield runtime


def request(name: str, path: str, *, method: str = "POST", body: str = "", query: str = "", **headers: str) -> Any:
    """Return one of AWS's HTTP events, filled with this request."""
    pairs = dict(httpx.QueryParams(query))
    event = aws_event(
        name,
        PATH=path,
        BODY_BASE64=base64.b64encode(body.encode()).decode(),
        BODY=body,
        QUERY_LISTS={key: [value] for key, value in pairs.items()} or None,
        QUERY_MAP=pairs,
        QUERY=query,
    )
    if "multiValueHeaders" in event:
        event["multiValueHeaders"] |= {key: [value] for key, value in headers.items()}
    else:
        event["headers"] |= headers
    if "httpMethod" in event:
        event["httpMethod"] = method
    else:
        event["requestContext"]["http"]["method"] = method
    return event


def callback(name: str, raw: bytes) -> Any:
    """Return one of the benchmark's callbacks as a Lambda event."""
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    headers = dict(one.split(": ", 1) for one in lines)
    return request(name, line.split(" ")[1], body=body.decode(), **headers)


async def test_a_callback_is_committed_and_delivered_before_its_answer(
    world: World, dynamo: Ledger, dynamodb_url: str
) -> None:
    await fill(dynamo, "b", len(HTTP))
    async with function(world, RECEIVER, dynamodb_url, KLING_RELAY_DELIVER="inline") as runtime:
        for count, (name, raw) in enumerate(zip(HTTP, servers.callbacks("b", len(HTTP))[len(HTTP) :], strict=True), 1):
            answer = answer_of(await runtime.invoke(callback(name, raw)))
            assert (answer.status_code, answer.headers["kling-relay-result"]) == (200, "applied"), name
            assert len(world.inbox.requests) == count, name
            again = answer_of(await runtime.invoke(callback(name, raw)))
            assert again.headers["kling-relay-result"] == "unchanged"
        assert (await dynamo.counts())["delivery.due"] == 0
        forged = servers.callbacks("b", 1)[1].replace(b"/callbacks/kling/b-0/", b"/callbacks/kling/b-9/")
        assert answer_of(await runtime.invoke(callback("alb", forged))).status_code == 404


@pytest.mark.parametrize("name", HTTP)
async def test_every_http_event_format_reaches_the_routes(
    world: World, dynamo: Ledger, dynamodb_url: str, name: str
) -> None:
    token = "t" * 16
    async with function(world, RECEIVER, dynamodb_url, KLING_RELAY_TICK_TOKEN=token) as runtime:
        health = answer_of(await runtime.invoke(request(name, "/healthz", method="GET")))
        assert health.json() == {"status": "ok"}
        ready = answer_of(await runtime.invoke(request(name, "/readyz", method="GET")))
        assert ready.json() == {"status": "ready"}
        ticked = request(name, "/tick", query="budget_s=5", authorization=f"Bearer {token}")
        assert answer_of(await runtime.invoke(ticked)).json() == {"delivered": 0, "polled": 0}
        wrong = request(name, "/tick", query="budget_s=x%20y", authorization=f"Bearer {token}")
        assert answer_of(await runtime.invoke(wrong)).status_code == 400


@pytest.mark.parametrize("name", ["scheduler", "scheduled_rule"])
async def test_a_scheduled_event_delivers_and_polls(world: World, dynamo: Ledger, dynamodb_url: str, name: str) -> None:
    await complete_task(dynamo, "order-1")
    async with function(world, RECEIVER, dynamodb_url) as runtime:
        assert await runtime.invoke(aws_event(name)) == {"delivered": 3, "polled": 0}
        assert len(world.inbox.requests) == 3


async def test_a_tick_ends_before_the_functions_timeout(world: World, dynamo: Ledger, dynamodb_url: str) -> None:
    silent, url = free_socket()
    with silent:
        silent.listen()
        world.hooks = f'[[hook]]\nname = "silent"\nurl = "{url}"\n'
        await complete_task(dynamo, "order-1")
        async with function(world, RECEIVER, dynamodb_url) as runtime:
            runtime.timeout_s = 4
            assert await runtime.invoke(aws_event("scheduler")) == {"delivered": 3, "polled": 0}
    assert (await dynamo.counts())["delivery.due"] == 3  # started and cancelled: due again once their leases expire


async def test_a_dynamodb_stream_event_delivers(world: World, dynamo: Ledger, dynamodb_url: str) -> None:
    await complete_task(dynamo, "order-1")
    keys = {"pk": {"S": "T#order-1"}, "sk": {"S": "e#0000000001"}}
    async with function(world, RECEIVER, dynamodb_url) as runtime:
        assert await runtime.invoke(aws_event("dynamodb_stream", KEYS=keys)) == {"batchItemFailures": []}
        assert len(world.inbox.requests) == 3


async def test_an_unknown_event_and_invalid_settings_are_errors(world: World, tmp_path: Path) -> None:
    async with function(world, RECEIVER, f"sqlite:///{tmp_path / 'a.db'}") as runtime:
        with pytest.raises(InvocationFailed, match="unknown event"):
            await runtime.invoke({"hello": "world"})
    async with lambda_function(RECEIVER, world.environ | {"KLING_RELAY_KEYS": ""}, tmp_path) as runtime:
        with pytest.raises(InvocationFailed, match="KLING_RELAY_KEYS"):
            await runtime.invoke(aws_event("scheduler"))


def task_event(world: World, id: str, **changes: Any) -> dict[str, Any]:
    """Return an event `task.requested`."""
    data = {
        "image": f"{world.hook_url}/files/girl.png",
        "video": f"{world.hook_url}/files/dance.mp4",
        "character_orientation": "video",
        "metadata": {"order": id},
    }
    return {"specversion": "1.0", "type": "task.requested", "source": "/shop", "id": id, "data": data | changes}


async def test_an_sqs_batch_fails_in_part_and_repeated_messages_create_one_task(world: World, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    async with function(world, SUBMITTER, url) as runtime:
        batch = aws_event("sqs")
        (record,) = batch["Records"]
        bodies = [
            task_event(world, "order-1"),
            task_event(world, "order-1"),
            task_event(world, "order-2", image="/etc/passwd"),
            aws_event("eventbridge", DETAIL=task_event(world, "order 3")),
            {"not": "an event"},
        ]
        batch["Records"] = [
            record | {"messageId": f"m{n}", "body": msgspec.json.encode(body).decode()} for n, body in enumerate(bodies)
        ]
        attributes = {name: {"stringValue": value, "dataType": "String"} for name, value in BINARY.items()}
        body = msgspec.json.encode(task_event(world, "")["data"]).decode()
        batch["Records"].append(record | {"messageId": "m5", "messageAttributes": attributes, "body": body})
        failed = (await runtime.invoke(batch))["batchItemFailures"]
        assert [one["itemIdentifier"] for one in failed] == ["m2", "m4"]
        again = (await runtime.invoke(batch))["batchItemFailures"]
        assert again == failed
    ledger = open_ledger(url)
    tasks = await ledger.tasks(limit=9)
    await ledger.close()
    names = sorted(task.external_task_id for task in tasks)
    assert names[1:] == ["order-1", "order-5"]
    assert names[0].startswith("ce-")
    assert {task.status for task in tasks} == {TaskStatus.SUBMITTED}
    assert world.kling.counts["created"] == 3


BINARY = {"ce-specversion": "1.0", "ce-type": "task.requested", "ce-source": "/shop", "ce-id": "order-5"}


async def test_an_eventbridge_event_submits_and_a_failure_is_reported(world: World, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    async with function(world, SUBMITTER, url) as runtime:
        detail = task_event(world, "")["data"] | {"external_task_id": "order-7"}
        assert await runtime.invoke(aws_event("eventbridge", DETAIL=detail)) is None
        assert await runtime.invoke(aws_event("eventbridge", DETAIL=detail)) is None
        with pytest.raises(InvocationFailed, match=r"character_orientatoin.*Did you mean 'character_orientation'"):
            await runtime.invoke(aws_event("eventbridge", DETAIL=detail | {"character_orientatoin": "video"}))
    ledger = open_ledger(url)
    assert [task.external_task_id for task in await ledger.tasks(limit=9)] == ["order-7"]
    await ledger.close()
    assert world.kling.counts["created"] == 1
