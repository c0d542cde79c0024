"""Preflight of media: the probe agrees with FFmpeg and Pillow and reads few bytes; limits are checked."""

import io
import struct
from pathlib import Path
from typing import Any

import av
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from submitter.errors import Problem
from submitter.guarded_http import guarded_client
from submitter.media.check import MediaFacts, check_media
from submitter.media.isobmff import BOXES_MAX, Unreadable, read_movie, sniff
from submitter.media.probe import REMOTE_REQUESTS, Medium, open_medium, probe
from submitter.request import MotionControl, check_request
from submitter.sandbox.media import make_video
from submitter.vendors.kling.v1 import LIMITS as LIMITS_V1
from submitter.vendors.kling.v2 import LIMITS as LIMITS_V2
from tests.world import World


def read(data: bytes) -> MediaFacts:
    reading = read_movie(sniff(data[:32]) or "", len(data))
    try:
        offset, length = next(reading)
        while True:
            offset, length = reading.send(data[offset : offset + length])
    except StopIteration as done:
        facts: MediaFacts = done.value
        return facts


def remux(data: bytes, folder: Path, name: str, *, format: str = "mp4", **options: str) -> bytes:
    """Copy the same frames into another container with FFmpeg."""
    path = folder / name
    with av.open(io.BytesIO(data), "r") as source, av.open(str(path), "w", format=format, options=options) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    return path.read_bytes()


VIDEO = make_video(4, 480, 360)


def test_a_file_that_is_shorter_than_its_server_states_is_unreadable() -> None:
    reading = read_movie("mp4", 1000)
    assert next(reading) == (0, 16)
    with pytest.raises(Unreadable, match="the file ends at byte 5, before its stated 1000 bytes"):
        reading.send(b"\0\0\0\x18f")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_boxes_are_bounded_at_every_depth(depth: int) -> None:
    boxes = struct.pack(">I4s", 8, b"free") * (BOXES_MAX + 1)
    for kind in (b"mdia", b"trak")[2 - depth :]:
        boxes = struct.pack(">I4s", len(boxes) + 8, kind) + boxes
    with pytest.raises(Unreadable, match=f"more than {BOXES_MAX} boxes"):
        read(b"\0\0\0\x08ftyp" + struct.pack(">I4s", len(boxes) + 8, b"moov") + boxes)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("mp4", {}),
        ("mp4", {"movflags": "+faststart"}),
        ("mov", {}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mp4", {"movflags": "dash+frag_keyframe+empty_moov+global_sidx"}),
        ("mp4", {"movflags": "frag_every_frame+empty_moov+omit_tfhd_offset"}),
    ],
)
def test_size_and_duration_agree_with_ffmpeg(tmp_path: Path, format: str, options: dict[str, str]) -> None:
    data = remux(VIDEO, tmp_path, "a.bin", format=format, **options)
    facts = read(data)
    assert (facts.format, facts.width, facts.height) == (format, 480, 360)
    assert facts.duration_s == pytest.approx(4.0, abs=0.1)


def test_the_rotation_of_a_phone_video_is_applied() -> None:
    data = bytearray(VIDEO)
    at = data.index(b"tkhd", data.index(b"moov")) + 4 + 40
    one = 1 << 16
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))
    data[at : at + 36] = turned
    with av.open(io.BytesIO(bytes(data)), "r") as container:
        assert abs(next(container.decode(video=0)).rotation) == 90
    facts = read(bytes(data))
    assert (facts.width, facts.height, facts.coded) == (360, 480, (360, 480))


@pytest.mark.parametrize("keep", [0, 7, 40, 1000, len(VIDEO) // 2, len(VIDEO) - 10])
def test_a_truncated_file_is_unreadable(keep: int) -> None:
    with pytest.raises(Unreadable):
        read(VIDEO[:keep])


@given(st.data())
def test_any_damaged_file_is_parsed_or_unreadable(data: st.DataObject) -> None:
    damaged = bytearray(VIDEO[VIDEO.index(b"moov") - 4 :])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        facts = read(bytes(damaged))
    except Unreadable:
        return
    assert facts.width is not None


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"GIF89a", "gif"),
        (b"RIFF\0\0\0\0WEBP", "webp"),
        (b"\x1aE\xdf\xa3", "webm or mkv"),
        (b"\0\0\0\x18ftypheic", "heic"),
        (b"\0\0\0\x14ftypqt  ", "mov"),
        (b"\0\0\0\x08wide", "mov"),
        (b"hello", None),
        (b"", None),
    ],
)
def test_the_format_is_detected_by_content(head: bytes, name: str | None) -> None:
    assert sniff(head) == name


async def probed(path: Path) -> MediaFacts:
    async with guarded_client(frozenset(), timeout_s=1) as client:
        found = await probe(Medium("image", path=path), client)
    assert found.facts is not None, found
    return found.facts


@pytest.mark.parametrize(("format", "name"), [("PNG", "png"), ("JPEG", "jpeg")])
async def test_an_image_with_a_wrong_extension_and_exif_rotation_is_probed_as_by_pillow(
    tmp_path: Path, format: str, name: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    path = tmp_path / "image.gif"
    Image.new("RGB", (640, 400)).save(path, format, exif=exif)
    facts = await probed(path)
    assert facts.format == name
    if format == "JPEG":
        assert (facts.width, facts.height) == (400, 640)


async def test_remote_media_are_probed_by_range_requests(world: World) -> None:
    await world.start(receiver=False)
    async with guarded_client(frozenset({"127.0.0.1"}), timeout_s=5) as client:
        found = await probe(Medium("video", url=f"{world.hook_url}/files/dance.mp4"), client)
    assert found.facts is not None
    assert (found.facts.width, found.facts.height) == (480, 360)
    assert found.facts.duration_s == pytest.approx(4, abs=0.1)


async def test_probing_a_url_ends_after_a_number_of_requests(world: World, media: Path) -> None:
    far = struct.pack(">I4s", 70_000, b"free") + bytes(70_000 - 8)  # each box lies beyond what the last request read
    (media / "far.mp4").write_bytes(b"\0\0\0\x08ftyp" + far * (REMOTE_REQUESTS + 1) + VIDEO)
    await world.start(receiver=False)
    async with guarded_client(frozenset({"127.0.0.1"}), timeout_s=5) as client:
        found = await probe(Medium("video", url=f"{world.hook_url}/files/far.mp4"), client)
    assert found.facts is None
    assert f"{REMOTE_REQUESTS} requests" in str(found.warning)


def facts(**fields: Any) -> MediaFacts:
    return msgspec.structs.replace(MediaFacts("mp4", 1000, 1280, 720, duration_s=5.0), **fields)


IMAGE = MediaFacts("png", 1000, 720, 1280)


@pytest.mark.parametrize(
    ("video", "orientation", "field"),
    [
        (facts(duration_s=10.5), "image", "video.duration"),
        (facts(duration_s=30.5), "video", "video.duration"),
        (facts(duration_s=2.9), "video", "video.duration"),
        (facts(width=339), "video", "video.size"),
        (facts(width=3851), "video", "video.size"),
        (facts(width=1280, coded=(300, 720)), "video", "video.size"),
        (facts(bytes=100 * 1024 * 1024 + 1), "video", "video.bytes"),
        (facts(format="webm or mkv"), "video", "video.format"),
    ],
)
def test_a_video_outside_a_limit_is_a_problem_of_its_field(video: MediaFacts, orientation: str, field: str) -> None:
    request = MotionControl(image="i", video="v", character_orientation=orientation)
    (problem,) = check_media(request, LIMITS_V2, IMAGE, video)
    assert problem.field == field
    assert problem.remedy


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (MediaFacts("png", 1000, 299, 400), "image.size"),
        (MediaFacts("png", 1000, 1001, 400), "image.aspect"),
        (MediaFacts("png", 1000, 400, 1001), "image.aspect"),
        (MediaFacts("webp", 1000, 400, 400), "image.format"),
        (MediaFacts("jpeg", 50 * 1024 * 1024 + 1, 400, 400), "image.bytes"),
    ],
)
def test_an_image_outside_a_limit_is_a_problem_of_its_field(image: MediaFacts, field: str) -> None:
    request = MotionControl(image="i", video="v", character_orientation="video")
    (problem,) = check_media(request, LIMITS_V2, image, facts())
    assert problem.field == field


def test_limits_are_inclusive() -> None:
    request = MotionControl(image="i", video="v", character_orientation="image", prompt="x" * 2500)
    edges = (MediaFacts("jpeg", 50 * 1024 * 1024, 1000, 400), facts(duration_s=10.004, width=340, height=3850))
    assert check_request(request, LIMITS_V2) == []
    assert check_media(request, LIMITS_V2, *edges) == []
    (problem,) = check_media(request, LIMITS_V1, *edges)
    assert problem.field == "image.bytes"  # the limit of the older API is 10 MB
    assert LIMITS_V2.image.max_aspect == (5, 2)


def test_every_problem_is_reported_at_once() -> None:
    request = MotionControl(
        image="i", video="v", character_orientation="sideways", mode="ultra", model="kling-v9", prompt="x" * 2501,
        negative_prompt="no", element_id="e", external_task_id="", metadata={"a": "x" * 5000},
    )  # fmt: skip
    fields = [problem.field for problem in check_request(request, LIMITS_V2)]
    assert fields == [
        "character_orientation", "mode", "model", "prompt", "negative_prompt",
        "element_id", "element_id", "element_id", "external_task_id", "metadata",
    ]  # fmt: skip


def test_base64_is_accepted_for_an_image_with_or_without_a_prefix_but_not_for_a_video() -> None:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "PNG")
    import base64

    encoded = base64.b64encode(out.getvalue()).decode()
    for value in (encoded, f"data:image/png;base64,{encoded}"):
        medium = open_medium("image", value, inline=True)
        assert isinstance(medium, Medium)
        assert medium.inline == out.getvalue()
        assert isinstance(open_medium("video", value, inline=False), Problem)
    assert isinstance(open_medium("image", "nowhere.png", inline=True), Problem)
    assert isinstance(open_medium("image", "ftp://x/y.png", inline=True), Problem)


def test_a_fragment_for_each_frame_is_read() -> None:
    """30 s at 60 frames a second, with sound, as `ffmpeg -movflags frag_every_frame` writes it."""

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), kind) + body

    def track(id: int, handler: bytes) -> bytes:
        shown = struct.pack(">9i2I", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30, 640 << 16, 480 << 16)
        header = box(b"tkhd", struct.pack(">6I", 0, 0, 0, id, 0, 0) + bytes(16) + shown)
        sample = box(b"avc1", bytes(24) + struct.pack(">HH", 640, 480) + bytes(50))
        described = box(b"stbl", box(b"stsd", struct.pack(">II", 0, 1) + sample))
        kind = box(b"hdlr", bytes(8) + handler + bytes(14))
        scale = box(b"mdhd", struct.pack(">5I", 0, 0, 0, 15360, 0) + bytes(4))
        return box(b"trak", header + box(b"mdia", scale + kind + box(b"minf", described)))

    def fragment(id: int) -> bytes:
        head = box(b"tfhd", struct.pack(">II", 0x20000, id))
        run = box(b"trun", struct.pack(">IIi", 1, 1, 100))
        return box(b"moof", box(b"mfhd", bytes(8)) + box(b"traf", head + run)) + box(b"mdat", bytes(8))

    extends = b"".join(box(b"trex", struct.pack(">6I", 0, id, 1, 256, 0, 0)) for id in (1, 2))
    header = box(b"mvhd", struct.pack(">5I", 0, 0, 0, 1000, 0) + bytes(80))
    movie = box(b"moov", header + track(1, b"vide") + track(2, b"soun") + box(b"mvex", extends))
    data = box(b"ftyp", b"isom" + bytes(4)) + movie + fragment(1) * 1800 + fragment(2) * 1290
    # 1,800 samples of 256 ticks at 15,360 a second
    assert read(data).duration_s == pytest.approx(30.0)
