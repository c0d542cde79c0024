"""The outcome of one delivery attempt. Pure."""

import msgspec


class Outcome(msgspec.Struct, frozen=True):
    """Whether a delivery attempt succeeded, and how to continue.

    answer         the destination's answer, or the error; shown in logs and dead letters
    retry_after_s  the delay that the destination asks for
    is_gone        the destination asks for no further events
    is_final       permanent failure: retrying this event cannot succeed
    """

    is_delivered: bool
    answer: str
    retry_after_s: float | None = None
    is_gone: bool = False
    is_final: bool = False


def failed_outcome(error: BaseException, *hidden: str | None) -> Outcome:
    """Return the outcome of an attempt that raised `error`; replace each secret in `hidden` by `[hidden]`."""
    name = type(error).__name__
    answer = f"{name}: {str(error).removeprefix(f'{name}: ')}" if str(error) else name
    for secret in filter(None, hidden):
        answer = answer.replace(secret, "[hidden]")
    return Outcome(False, answer[:500])
