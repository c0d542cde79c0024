"""Reads and renders real media for the sandbox, with FFmpeg's libraries (PyAV).

It shares no code with preflight on purpose: each verifies the other.
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import av
import av.filter

FPS_MAX = 24
SIDE = {"720p": 720, "1080p": 1080}


class MediaInfo(NamedTuple):
    """Metadata of a media file: FFmpeg's name of its format, pixels as displayed, seconds (videos only)."""

    format: str
    width: int
    height: int
    duration_s: float


class NotMedia(Exception):
    """FFmpeg can decode no picture from these bytes."""


def inspect(data: bytes) -> MediaInfo:
    """Return the metadata of an image or video, read from its content; raise NotMedia."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream))
            is_rotated = abs(frame.rotation) % 180 == 90
            width, height = (frame.height, frame.width) if is_rotated else (frame.width, frame.height)
            duration_s = float(container.duration or 0) / av.time_base
            return MediaInfo(container.format.name, width, height, duration_s)
    except (av.error.FFmpegError, IndexError, StopIteration, ValueError) as error:
        raise NotMedia(str(error)) from error


@lru_cache(maxsize=16)
def render(image: bytes, video: bytes, *, resolution: str, sound: bool, limit_s: float) -> tuple[bytes, float]:
    """Return an MP4 of at most `limit_s` seconds in the image's aspect ratio, and its duration in seconds.

    It shows the reference video with the image in a corner; `sound` keeps the video's sound.
    """
    info = inspect(image)
    width, height = _size(info, SIDE[resolution])
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(image), "r") as still,
        av.open(io.BytesIO(video), "r") as source,
        av.open(out, "w", format="mp4") as target,
    ):
        picture = target.add_stream("libx264", rate=FPS_MAX, options={"preset": "ultrafast", "crf": "30"})
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        picture.time_base = Fraction(1, FPS_MAX)
        voice = target.add_stream("aac", rate=44100, layout="stereo") if sound and source.streams.audio else None
        scene = _compose(next(still.decode(video=0)), source.streams.video[0], width, height)
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=44100)
        count = 0
        for frame in source.decode(*source.streams.video[:1], *(source.streams.audio[:1] if voice else ())):
            if not isinstance(frame, av.AudioFrame | av.VideoFrame) or (frame.time or 0) >= limit_s:
                continue
            if isinstance(frame, av.AudioFrame):
                for piece in resampler.resample(frame):
                    target.mux(voice.encode(piece) if voice else [])
            else:
                count = _encode(scene, frame, picture, target, count, round(limit_s * FPS_MAX))
        count = _encode(scene, None, picture, target, count, round(limit_s * FPS_MAX))
        target.mux(picture.encode(None))
        if voice:
            target.mux(voice.encode(None))
    return out.getvalue(), count / FPS_MAX


def make_image(width: int = 720, height: int = 1280) -> bytes:
    """Return a PNG with a test pattern."""
    frame = next(_generate("testsrc2", f"size={width}x{height}:rate=1:duration=1"))
    out = io.BytesIO()
    with av.open(out, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        container.mux(stream.encode(frame.reformat(format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def make_video(seconds: float = 4, width: int = 640, height: int = 360) -> bytes:
    """Return an MP4 with a moving test pattern and a tone."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        voice = container.add_stream("aac", rate=44100, layout="stereo")
        for frame in _generate("testsrc2", f"size={width}x{height}:rate=24:duration={seconds}", ("format", "yuv420p")):
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        tone = f"frequency=440:sample_rate=44100:duration={seconds}"
        stereo = ("aformat", "sample_fmts=fltp:channel_layouts=stereo")
        for frame in _generate("sine", tone, stereo, sound=True):
            container.mux(voice.encode(frame))
        container.mux(voice.encode(None))
    return out.getvalue()


def _size(info: MediaInfo, side: int) -> tuple[int, int]:
    scale = Fraction(side, min(info.width, info.height))
    return round(info.width * scale / 2) * 2, round(info.height * scale / 2) * 2


class _Scene(NamedTuple):
    """A filter graph with its source and sink. Keeps a reference to the graph, which must outlive them."""

    graph: av.filter.Graph
    source: Any
    sink: Any


def _compose(image: Any, video: Any, width: int, height: int) -> _Scene:
    graph = av.filter.Graph()
    back = graph.add_buffer(template=video)
    front = graph.add_buffer(
        width=image.width, height=image.height, format=image.format, time_base=Fraction(1, FPS_MAX)
    )
    fps = graph.add("fps", str(FPS_MAX))
    fill = graph.add("scale", f"{width}:{height}:force_original_aspect_ratio=decrease:flags=fast_bilinear")
    pad = graph.add("pad", f"{width}:{height}:(ow-iw)/2:(oh-ih)/2")
    small = graph.add("scale", f"{width // 3}:-2")
    over = graph.add("overlay", "16:16")
    end = graph.add("format", "yuv420p")
    sink = graph.add("buffersink")
    for before, after, entry in (
        (back, fps, 0),
        (fps, fill, 0),
        (fill, pad, 0),
        (pad, over, 0),
        (front, small, 0),
        (small, over, 1),
        (over, end, 0),
        (end, sink, 0),
    ):
        before.link_to(after, 0, entry)
    graph.configure()
    image.pts, image.time_base = 0, Fraction(1, FPS_MAX)
    front.push(image)
    front.push(None)
    return _Scene(graph, back, sink)


def _encode(scene: _Scene, frame: Any, picture: Any, target: Any, count: int, frames_max: int) -> int:
    """Push one frame (None: the end) through the scene, encode the output, and return the frames encoded so far."""
    scene.source.push(frame)
    for composed in _drain(scene.sink):
        if count < frames_max:
            composed.pts, composed.time_base = count, Fraction(1, FPS_MAX)
            composed.pict_type = 0
            target.mux(picture.encode(composed))
            count += 1
    return count


def _drain(sink: Any) -> Iterator[Any]:
    while True:
        try:
            yield sink.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _generate(source: str, options: str, *after: tuple[str, str], sound: bool = False) -> Iterator[Any]:
    graph = av.filter.Graph()
    last = graph.add(source, options)
    for name, arguments in after:
        node = graph.add(name, arguments)
        last.link_to(node)
        last = node
    sink = graph.add("abuffersink" if sound else "buffersink")
    last.link_to(sink)
    graph.configure()
    yield from _drain(sink)
