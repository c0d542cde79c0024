"""MP4 and MOV parser: reads size, rotation and duration from a few kilobytes. Pure.

Source: ISO/IEC 14496-12 (ISO base media file format) and Apple's QuickTime File Format. Sans I/O: the
parser is a generator that yields `(offset, length)` and is sent the bytes, so that it reads files and
URLs alike. Supports fragmented files, `moov` at the end, rotation matrices and non-square pixels.
"""

import struct
from collections.abc import Generator, Iterator
from typing import NamedTuple

from submitter.media.check import MediaFacts

Reading = Generator[tuple[int, int], bytes, MediaFacts]

BOX_MAX = 16 * 1024 * 1024
BOXES_MAX = 100_000  # of one file, at all depths together: its parse takes 30 ms, whatever it holds
_UNKNOWN = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
_OLD_MOV = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_STILL = {b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"msf1": "heic", b"avif": "avif", b"avis": "avif"}


class Unreadable(Exception):
    """The file is damaged or incomplete; the message states how."""


class _Walk:
    """Walks the boxes of one file, and counts them: at most BOXES_MAX at all depths together."""

    def __init__(self) -> None:
        self._left = BOXES_MAX

    def count(self) -> None:
        """Count one box; raise Unreadable beyond the limit."""
        self._left -= 1
        if self._left < 0:
            raise Unreadable(f"it has more than {BOXES_MAX} boxes")

    def boxes(self, data: memoryview, start: int = 0) -> Iterator[tuple[bytes, memoryview]]:
        """Yield the type and the body of each box in `data`."""
        while start + 8 <= len(data):
            self.count()
            length, kind = struct.unpack_from(">I4s", data, start)
            header = 8
            if length == 1 and start + 16 <= len(data):
                length, header = struct.unpack_from(">Q", data, start + 8)[0], 16
            elif length == 0:
                length = len(data) - start
            if length < header:
                return
            yield kind, data[start + header : start + length]
            start += length

    def find(self, data: memoryview, *path: bytes) -> memoryview | None:
        """Return the body of the first box at `path`, or None."""
        for kind, body in self.boxes(data):
            if kind == path[0]:
                return body if len(path) == 1 else self.find(body, *path[1:])
        return None


class _Track(NamedTuple):
    id: int
    coded: tuple[int, int]
    shown: tuple[int, int]
    duration_s: float | None
    timescale: int


def sniff(head: bytes) -> str | None:
    """Return the format of a file from its first 32 bytes (magic number), or None if unknown."""
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _STILL:
            return _STILL[brand]
        if brand[:3] in (b"3gp", b"3g2"):
            return "3gp"
        return "mov" if brand == b"qt  " else "mp4"
    if head[4:8] in _OLD_MOV and len(head) >= 8:
        return "mov"
    for magic, name in (
        (b"\x1aE\xdf\xa3", "webm or mkv"),
        (b"GIF8", "gif"),
        (b"BM", "bmp"),
        (b"II*\x00", "tiff"),
        (b"MM\x00*", "tiff"),
    ):
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12], "riff")
    return None


def read_movie(format: str, size: int) -> Reading:
    """Parse an MP4 or MOV file of `size` bytes; raise Unreadable."""
    walk = _Walk()
    track: _Track | None = None
    default_ticks = 0
    fragments_s = indexed_s = 0.0
    offset = 0
    while offset + 8 <= size:
        walk.count()
        head = yield offset, min(16, size - offset)
        if len(head) < min(16, size - offset):
            raise Unreadable(f"the file ends at byte {offset + len(head)}, before its stated {size} bytes")
        kind, header, length = _box_at(head, offset, size)
        if kind in (b"moov", b"moof", b"sidx"):
            if length > BOX_MAX or offset + length > size:
                raise Unreadable(f"the file ends inside its {kind.decode()} box")
            body = memoryview((yield offset + header, length - header))
            if kind == b"moov":
                track = _video_track(walk, body)
                default_ticks = _default_duration(walk, body, track.id)
                if track.duration_s is not None:
                    break
            elif kind == b"sidx":
                indexed_s = indexed_s or _sidx_s(body)
            elif track is not None and not indexed_s:
                fragments_s += _fragment_s(walk, body, track, default_ticks)
        if track is not None and indexed_s:
            break
        offset += length
    if track is None:
        raise Unreadable("no moov box, so no player can open the file (an incomplete download?)")
    duration_s = track.duration_s or indexed_s or fragments_s or None
    width, height = track.shown
    return MediaFacts(format, size, width, height, track.coded, duration_s)


def _box_at(head: bytes, offset: int, size: int) -> tuple[bytes, int, int]:
    """Return a box's type, the length of its header and its total length, in bytes."""
    length, kind = struct.unpack(">I4s", head[:8])
    header = 8
    if length == 1 and len(head) == 16:
        length, header = struct.unpack(">Q", head[8:16])[0], 16
    elif length == 0:
        length = size - offset
    if length < header:
        raise Unreadable(f"the box at byte {offset} has an invalid length of {length} bytes")
    return kind, header, length


def _video_track(walk: _Walk, movie: memoryview) -> _Track:
    try:
        header = walk.find(movie, b"mvhd")
        movie_scale, movie_duration = _scale_and_duration(header) if header else (0, 0)
        for kind, trak in walk.boxes(movie):
            handler = walk.find(trak, b"mdia", b"hdlr") if kind == b"trak" else None
            if handler is not None and bytes(handler[8:12]) == b"vide":
                return _track(walk, trak, movie, movie_scale, movie_duration)
    except (struct.error, IndexError) as error:
        raise Unreadable(f"the moov box is damaged: {error}") from error
    raise Unreadable("no video track")


def _scale_and_duration(full_box: memoryview) -> tuple[int, int]:
    if full_box[0] == 1:
        scale, duration = struct.unpack_from(">IQ", full_box, 20)
    else:
        scale, duration = struct.unpack_from(">II", full_box, 12)
    return scale, 0 if duration in _UNKNOWN else duration


def _track(walk: _Walk, trak: memoryview, movie: memoryview, movie_scale: int, movie_duration: int) -> _Track:
    tkhd, mdhd = walk.find(trak, b"tkhd"), walk.find(trak, b"mdia", b"mdhd")
    stsd = walk.find(trak, b"mdia", b"minf", b"stbl", b"stsd")
    if tkhd is None or mdhd is None or stsd is None:
        raise Unreadable("the video track lacks tkhd, mdhd or stsd")
    wide = tkhd[0] == 1
    id = struct.unpack_from(">I", tkhd, 20 if wide else 12)[0]
    shown_duration = struct.unpack_from(">Q" if wide else ">I", tkhd, 28 if wide else 20)[0]
    matrix_at = 52 if wide else 40
    a, b, _, c, d = struct.unpack_from(">5i", tkhd, matrix_at)
    width, height = (value >> 16 for value in struct.unpack_from(">II", tkhd, matrix_at + 36))
    coded = struct.unpack_from(">HH", stsd, 8 + 32)
    ratio = _pixel_ratio(walk, stsd)
    if not width or not height:
        width, height = round(coded[0] * ratio), coded[1]
    if a == 0 and d == 0 and b and c:  # rotated by 90 or 270 degrees
        width, height, coded = height, width, (coded[1], coded[0])
    timescale, media_duration = _scale_and_duration(mdhd)
    mehd = walk.find(movie, b"mvex", b"mehd")
    fragments = struct.unpack_from(">Q" if mehd[0] else ">I", mehd, 4)[0] if mehd else 0
    duration_s = None
    for ticks, scale in (
        (0 if shown_duration in _UNKNOWN else shown_duration, movie_scale),  # with edit lists applied
        (media_duration, timescale),
        (fragments, movie_scale),
        (movie_duration, movie_scale),
    ):
        if ticks and scale:
            duration_s = ticks / scale
            break
    return _Track(id, coded, (width, height), duration_s, timescale)


def _pixel_ratio(walk: _Walk, stsd: memoryview) -> float:
    for kind, body in walk.boxes(stsd, 8 + 86):  # after the fixed fields of the visual sample entry
        if kind == b"pasp":
            horizontal, vertical = struct.unpack_from(">II", body)
            return horizontal / vertical if horizontal and vertical else 1.0
    return 1.0


def _sidx_s(body: memoryview) -> float:
    try:
        timescale = struct.unpack_from(">I", body, 8)[0]
        at = 4 + 8 + (16 if body[0] else 8) + 2
        count = struct.unpack_from(">H", body, at)[0]
        ticks = sum(struct.unpack_from(">I", body, at + 2 + 12 * i + 4)[0] for i in range(count))
    except (struct.error, IndexError):
        return 0.0
    return float(ticks / timescale) if timescale else 0.0


def _fragment_s(walk: _Walk, moof: memoryview, track: _Track, default_ticks: int) -> float:
    ticks = 0
    try:
        for kind, traf in walk.boxes(moof):
            tfhd = walk.find(traf, b"tfhd") if kind == b"traf" else None
            if tfhd is None or struct.unpack_from(">I", tfhd, 4)[0] != track.id:
                continue
            flags = int.from_bytes(tfhd[1:4], "big")
            default = default_ticks
            if flags & 0x08:
                at = 8 + (8 if flags & 0x01 else 0) + (4 if flags & 0x02 else 0)
                default = struct.unpack_from(">I", tfhd, at)[0]
            ticks += sum(_run_ticks(run, default) for name, run in walk.boxes(traf) if name == b"trun")
    except (struct.error, IndexError) as error:
        raise Unreadable(f"a fragment is damaged: {error}") from error
    return float(ticks / track.timescale) if track.timescale else 0.0


def _default_duration(walk: _Walk, movie: memoryview, track_id: int) -> int:
    """Return the ticks of a sample in fragments that state none; 0 in a file without fragments."""
    for kind, body in walk.boxes(walk.find(movie, b"mvex") or memoryview(b"")):
        if kind == b"trex" and len(body) >= 16 and struct.unpack_from(">I", body, 4)[0] == track_id:
            return int(struct.unpack_from(">I", body, 12)[0])
    return 0


def _run_ticks(run: memoryview, default: int) -> int:
    flags = int.from_bytes(run[1:4], "big")
    count = struct.unpack_from(">I", run, 4)[0]
    if not flags & 0x100:
        return int(count) * default
    at = 8 + (4 if flags & 0x01 else 0) + (4 if flags & 0x04 else 0)
    stride = 4 * (flags & 0xF00).bit_count()
    samples = run[at : at + stride * min(count, len(run) // stride)]
    whole = samples[: len(samples) - len(samples) % stride]
    return sum(ticks for (ticks,) in struct.iter_unpack(f">I{stride - 4}x", whole))
