"""Python API: submits Kling Motion Control tasks idempotently and waits for their results.

async with Submitter.from_settings() as submitter:
    task = await submitter.submit(MotionControl(image="girl.png", video="https://...", character_orientation="video"))
    done = await task.result(timeout=1800)
"""

from typing import TYPE_CHECKING, Any

from submitter.request import MotionControl

if TYPE_CHECKING:
    from submitter.submit import Submitter
    from submitter.submitted_task import SubmittedTask

__all__ = ["MotionControl", "SubmittedTask", "Submitter"]


def __getattr__(name: str) -> Any:
    # Lazy: the receiver imports this package too, and needs no HTTP client.
    if name == "Submitter":
        from submitter.submit import Submitter

        return Submitter
    if name == "SubmittedTask":
        from submitter.submitted_task import SubmittedTask

        return SubmittedTask
    raise AttributeError(name)
