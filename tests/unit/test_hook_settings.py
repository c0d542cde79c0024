"""Hook settings: valid and invalid `[[hook]]` tables."""

import msgspec
import pytest

from receiver.hook import SCHEDULE_S
from receiver.hook_settings import read_hooks
from submitter.errors import Problem
from tests.world import HOOK_SECRET

VALID = {"name": "billing", "url": "https://billing.example.com/kling", "secret": "env:S"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "hook[1].name"),
        ({"url": "ftp://x/y"}, "hook[billing].url"),
        ({"url": "https://"}, "hook[billing].url"),
        ({"url": "redis:///stream"}, "hook[billing].url"),
        ({"url": "redis://host/stream"}, "hook[billing].secret"),
        ({"when": "data.["}, "hook[billing].when"),
        ({"latest_only": "yes"}, "hook[billing].latest_only"),
        ({"events": ["task.done"]}, "hook[billing].events"),
        ({"events": []}, "hook[billing].events"),
        ({"secret": []}, "hook[billing].secret"),
        ({"events": "task.succeed"}, "hook[billing].events"),
        ({"secret": "whsec_inline"}, "hook[billing].secret"),
        ({"secret": "env:MISSING"}, "hook[billing].secret"),
        ({"secret": "env:SHORT"}, "hook[billing].secret"),
        ({"secret": "env:ED"}, "hook[billing].secret"),
        ({"signature": "v1a"}, "hook[billing].secret"),
        ({"mode": "xml"}, "hook[billing].mode"),
        ({"schedule": []}, "hook[billing].schedule"),
        ({"schedule": [0, -5]}, "hook[billing].schedule"),
        ({"schedule": [0, 31 * 86_400]}, "hook[billing].schedule"),
        ({"timeout_s": 0}, "hook[billing].timeout_s"),
        ({"timeout_s": "15"}, "hook[billing].timeout_s"),
        ({"concurrency": 0}, "hook[billing].concurrency"),
        ({"concurrency": True}, "hook[billing].concurrency"),
        ({"rate": 0}, "hook[billing].rate"),
        ({"max_mb": 0}, "hook[billing].max_mb"),
        ({"url": "redis://u:p/w@host/stream"}, "hook[billing].url"),
        ({"url": "https://billing.example.com:99999/"}, "hook[billing].url"),
        ({"retries": 3}, "hook[billing].retries"),
    ],
)
def test_a_problem_names_the_hook_and_the_field_and_never_the_secret(change: dict[str, object], field: str) -> None:
    environ = {"S": HOOK_SECRET, "SHORT": "whsec_YWJj", "ED": "whsk_" + HOOK_SECRET.removeprefix("whsec_")}
    problems: list[Problem] = []

    def follow(where: str, reference: str) -> str | None:
        kind, _, name = reference.partition(":")
        if kind != "env":
            return reference
        if name not in environ:
            problems.append(Problem(where, reference, "a variable that is set", f"Set {name}."))
        return environ.get(name)

    read_hooks([VALID | change], follow, problems)
    assert field in [problem.field for problem in problems]
    for problem in problems:
        assert "YWJj" not in str(problem)
        assert HOOK_SECRET not in str(problem)


def test_a_valid_hook_is_read_and_its_repr_hides_secrets() -> None:
    problems: list[Problem] = []
    (hook,) = read_hooks(
        [VALID | {"url": "https://user:pass@example.com/x"}],
        lambda where, reference: HOOK_SECRET if reference == "env:S" else reference,
        problems,
    )
    assert problems == []
    assert "pass" not in repr(hook)
    assert HOOK_SECRET not in repr(hook)
    assert msgspec.structs.asdict(hook)["schedule_s"] == SCHEDULE_S
