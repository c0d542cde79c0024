"""A task's results: what a new report, a refresh or an archive changes in them. Pure."""

from collections.abc import Mapping

from msgspec.structs import replace

from submitter.observation import PUSHED, Report
from submitter.task import ArchivedCopy, Task, TaskStatus, Video


def lacks_watermark(task: Task, report: Report) -> bool:
    """Return whether a pushed result lacks the watermarked copy that was requested: a query may have it."""
    is_result = report.source in PUSHED and report.status is TaskStatus.SUCCEED
    return (
        is_result
        and task.request.get("watermark") == "yes"
        and any(video.watermark_url is None for video in report.videos)
    )


def renewed(task: Task, report: Report) -> Task:
    """Return a succeeded task with a report's new URLs and cost; its archived copies stay."""
    videos = tuple(
        replace(new, archived=old.archived, archived_watermark=old.archived_watermark)
        for new, old in zip(report.videos, task.videos, strict=False)
    )
    return replace(task, videos=videos or task.videos, cost=report.cost or task.cost)


def with_copies(videos: tuple[Video, ...], copies: Mapping[str, ArchivedCopy]) -> tuple[Video, ...]:
    """Return results with archived copies, by the URLs that they were downloaded from, where they have none yet."""
    return tuple(
        replace(
            video,
            archived=video.archived or copies.get(video.url),
            archived_watermark=video.archived_watermark or copies.get(video.watermark_url or ""),
        )
        for video in videos
    )
