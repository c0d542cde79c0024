"""Receiver settings: the common ones, hooks, webhook secrets, and the tokens of its endpoints."""

from collections.abc import Mapping

import msgspec

from receiver.hook import Hook
from receiver.hook_settings import read_hooks
from receiver.signature import Secret, read_secret
from submitter.errors import InvalidSettings
from submitter.settings import Settings, no_keys, open_reader, read_settings
from submitter.vendors.registry import vendors
from submitter.web_address import without_password

DELIVER = ("worker", "inline")
WORKERS_MAX = 64
CONFIRM = ("never", "terminal", "always")


class ReceiverSettings(msgspec.Struct, frozen=True):
    """The settings of `serve`, `deliver` and `poll`.

    `secrets` and `confirm` are by vendor. A poll must confirm no report (`never`), those that end a task
    (`terminal`), or all (`always`).
    """

    common: Settings
    hooks: tuple[Hook, ...]
    secrets: dict[str, tuple[Secret, ...]]
    confirm: dict[str, str]
    tick_token: str | None
    events_token: str | None
    log: str | None
    body_limit: int
    deliver: str
    deliver_budget_s: float
    workers: int

    def __repr__(self) -> str:
        return f"ReceiverSettings({without_password(self.common.ledger)!r}, {len(self.hooks)} hooks)"

    def require_keys(self) -> None:
        """Raise InvalidSettings when there is no key ring to verify callback URLs with."""
        if self.common.ring is None:
            raise InvalidSettings([no_keys()])


def load_receiver_settings(environ: Mapping[str, str] | None = None) -> ReceiverSettings:
    """Read every setting; raise InvalidSettings with every problem."""
    reader = open_reader(environ)
    common = read_settings(reader)
    hooks = read_hooks(reader.table.get("hook", []), reader.secret, reader.problems)
    secrets: dict[str, tuple[Secret, ...]] = {}
    confirm: dict[str, str] = {}
    for name, setup in vendors().items():  # verifying callbacks needs no API key
        default = "never" if setup.reader.signs_callbacks else "terminal"
        confirm[name] = reader.choice("confirm", CONFIRM, default, vendor=name)
        variable = f"{name.upper()}_WEBHOOK_SECRET"
        table = reader.vendor_table(name)
        value = reader.secret_setting("webhook_secret", variable, table)
        found = []
        for part in value.split(",") if value else ():
            try:
                found.append(read_secret(variable, part))
            except InvalidSettings as error:
                reader.problems.extend(error.problems)
        secrets[name] = tuple(found)
    tokens = {
        name: reader.secret_setting(name, f"KLING_RELAY_{name.upper()}", reader.table)
        for name in ("tick_token", "events_token")
    }
    for name, token in tokens.items():
        if token is not None and len(token) < 16:
            variable = f"KLING_RELAY_{name.upper()}"
            reader.problem(variable, "[hidden]", "16 characters or more", "Set it to a long random string.")
    style = reader.text("log")
    if style not in (None, "json", "console"):
        reader.problem("KLING_RELAY_LOG", repr(style), "json or console", "Use one of them.")
    deliver = reader.choice("deliver", DELIVER, "worker")
    deliver_budget_s = reader.number("deliver_budget_s", 5, least=0.1) or 5
    body_limit = reader.number("body_limit", 64 * 1024, least=1024, whole=True) or 64 * 1024
    workers = reader.number("workers", 1, least=1, most=WORKERS_MAX, whole=True) or 1
    reader.finish()
    return ReceiverSettings(
        common=common,
        hooks=hooks,
        secrets=secrets,
        confirm=confirm,
        tick_token=tokens["tick_token"],
        events_token=tokens["events_token"],
        log=style,
        body_limit=int(body_limit),
        deliver=deliver,
        deliver_budget_s=deliver_budget_s,
        workers=int(workers),
    )
