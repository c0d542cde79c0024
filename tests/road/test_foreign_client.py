"""A third-party client of Kling, the npm package `kling-api`, against the sandbox through TLS."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn

from submitter.sandbox.app import create_sandbox
from submitter.sandbox.kling_wire import ACCESS_KEY, SECRET_KEY
from submitter.sandbox.server import free_socket
from tests.conftest import needs
from tests.world import World

JS = Path(__file__).parents[1] / "js"


@asynccontextmanager
async def sandbox_over_tls(world: World, folder: Path) -> AsyncIterator[str]:
    """Serve the world's sandboxes over TLS; yield the URL. The CA's certificate is in `folder`."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    bound, url = free_socket()
    url = url.replace("http://127.0.0.1", "https://localhost")
    app = create_sandbox(world.sandboxes.values(), base_url=url)
    config = uvicorn.Config(app, log_level="error", lifespan="off", ssl_certfile=str(folder / "server.pem"))
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield url
    finally:
        server.should_exit = True
        await serving
        bound.close()


@pytest.mark.slow
async def test_a_foreign_client_can_use_the_sandbox(world: World, tmp_path: Path) -> None:
    needs("node with npm", is_there=bool(shutil.which("node") and shutil.which("npm")))
    shutil.copytree(JS, tmp_path / "js")
    pipe = asyncio.subprocess.PIPE
    install = await asyncio.create_subprocess_exec(
        "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=tmp_path / "js", stdout=pipe, stderr=pipe
    )
    await install.communicate()
    needs("npm's registry", is_there=install.returncode == 0)
    await world.start(receiver=False)
    files = f"{world.hook_url}/files"
    body = {
        "model_name": "kling-v3", "image_url": f"{files}/girl.png", "video_url": f"{files}/dance.mp4", "mode": "std",
        "character_orientation": "video", "external_task_id": "order-1",
    }  # fmt: skip
    async with sandbox_over_tls(world, tmp_path) as url:
        given = {"url": f"{url}/kling", "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY, "body": body}
        client = await asyncio.create_subprocess_exec(
            "node", "kling_client.mjs", cwd=tmp_path / "js", stdin=pipe, stdout=pipe, stderr=pipe,
            env=os.environ | {"NODE_EXTRA_CA_CERTS": str(tmp_path / "ca.pem")},
        )  # fmt: skip
        async with asyncio.timeout(120):
            out, err = await client.communicate(json.dumps(given).encode())
    assert client.returncode == 0, err.decode()
    found: dict[str, Any] = json.loads(out)
    task_id = found["created"]["task_id"]
    assert found["created"]["task_info"] == {"external_task_id": "order-1"}
    assert (found["ended"]["task_status"], found["ended"]["task_id"]) == ("succeed", task_id)
    assert found["ended"]["task_result"]["videos"][0]["url"].startswith(url)
    assert (found["byOwnId"], found["listed"]) == (task_id, [task_id])
    assert found["account"]["resource_pack_subscribe_infos"]
    errors = {name: (found[name]["code"], found[name]["status"]) for name in ("duplicate", "absent", "wrongShape")}
    assert errors == dict.fromkeys(errors, (1201, 400))
    assert "already exists" in found["duplicate"]["message"]
    assert (found["unknownPath"]["code"], found["unknownPath"]["status"]) == (1203, 404)
    assert "/v1/videos/text2video does not exist" in found["unknownPath"]["message"]
    assert found["unknownPath"]["requestId"].startswith("sandbox-")
    assert found["empty"] == "submitted"
