"""Settings: environment variables override `relay.toml`, which overrides defaults. Reports all problems at once."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from submitter.callback_url import KeyRing
from submitter.errors import InvalidRequest, InvalidSettings, Problem
from submitter.schedule import DELAY_MAX_S, Backoff, PollPolicy
from submitter.vendors.base import CallbackSetting, Vendor, VendorSetup
from submitter.vendors.registry import vendors as installed_vendors
from submitter.web_address import why_not_host, why_not_web, without_password

CONFIG_FILE = "relay.toml"

# The top-level names of relay.toml; each is also read from KLING_RELAY_<NAME>.
NUMBER_MAX = 1e12
COMMON = ("public_url", "ledger", "keys", "allow_hosts", "poll_after_s", "abandon_after_s", "media_store", "parallel")
RECEIVER = ("tick_token", "events_token", "log", "body_limit", "deliver", "deliver_budget_s", "workers")
OF_VENDOR = ("confirm", "callbacks", "parallel", "poll_after_s")


class VendorSettings(msgspec.Struct, frozen=True):
    """One configured vendor. `parallel` limits its open tasks (reserved, not settled); None is unlimited."""

    vendor: Vendor
    parallel: int | None
    poll_policy: PollPolicy
    callbacks: CallbackSetting


class Settings(msgspec.Struct, frozen=True):
    """The settings that submitter and receiver share. Secrets never appear in repr(): it shows names only."""

    public_url: str | None
    ledger: str
    ring: KeyRing | None
    vendors: dict[str, VendorSettings]
    allow_hosts: frozenset[str]
    media_store: str | None

    def __repr__(self) -> str:
        return f"Settings({without_password(self.ledger)!r}, {', '.join(self.vendors)})"

    def require_callbacks(self) -> tuple[str, KeyRing]:
        """Return the public URL and the keys; raise InvalidSettings that names the missing ones."""
        problems = []
        if self.public_url is None:
            problems.append(
                Problem(
                    "KLING_RELAY_PUBLIC_URL",
                    "not set",
                    "the public https URL of the receiver",
                    "Set it, or use --no-callback (in Python: callback=False), so that the task is only polled.",
                )
            )
        if self.ring is None:
            problems.append(no_keys())
        if self.public_url is None or self.ring is None:
            raise InvalidSettings(problems)
        return self.public_url, self.ring

    def require_vendor(self, name: str) -> VendorSettings:
        """Return a vendor; raise InvalidSettings without credentials, InvalidRequest for an unknown name."""
        if name in self.vendors:
            return self.vendors[name]
        known = installed_vendors()
        if name not in known:
            limit = f"one of {', '.join(known)}"
            raise InvalidRequest([Problem("vendor", repr(name), limit, "Choose one of them.")])
        raise InvalidSettings([Problem(name, "no credentials", "an API key", known[name].credentials_remedy)])


def no_keys() -> Problem:
    """Return the problem of missing keys."""
    remedy = "Create one with `kling-relay keys new`."
    return Problem("KLING_RELAY_KEYS", "not set", "the signing keys of callback URLs", remedy)


class Reader:
    """Reads single settings and collects their problems, so that `finish` reports all at once."""

    def __init__(self, environ: Mapping[str, str], table: Mapping[str, Any]) -> None:
        self.environ = environ
        self.table = table
        self.problems: list[Problem] = []

    def problem(self, field: str, value: str, limit: str, remedy: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(field, value, limit, remedy))

    def text(self, name: str, *, vendor: str | None = None) -> str | None:
        """Return KLING_RELAY_<NAME>, or `name` from the file; with `vendor`, `name` from `[vendor.<vendor>]`."""
        variable = f"KLING_RELAY_{name.upper()}"
        if vendor is None and self.environ.get(variable):
            return self.environ[variable]
        table = self.table if vendor is None else self.vendor_table(vendor)
        value = table.get(name)
        if isinstance(value, list):
            value = ",".join(str(item) for item in value)
        if isinstance(value, bool):
            value = str(value).lower()
        return None if value is None else self.secret(f"{name} in {CONFIG_FILE}", str(value))

    def number(
        self,
        name: str,
        default: float | None,
        *,
        vendor: str | None = None,
        least: float = 0,
        most: float = NUMBER_MAX,
        whole: bool = False,
    ) -> float | None:
        """Return a number from `least` to `most`; add a problem and return `default` for any other value."""
        value = self.text(name, vendor=vendor)
        if value is None:
            return default
        try:
            found = float(value)
        except ValueError:
            found = float("nan")
        if not least <= found <= most or (whole and found % 1):
            is_open, number = most == NUMBER_MAX, "a whole number" if whole else "a number"
            limit = f"{number} of at least {least:g}" if is_open else f"{number} from {least:g} to {most:.0f}"
            remedy = f"Use {least:g} or more." if is_open else f"Use {least:g} to {most:.0f}."
            self.problem(self._place(name, vendor), repr(value), limit, remedy)
            return default
        return found

    def choice(self, name: str, choices: tuple[str, ...], default: str, *, vendor: str | None = None) -> str:
        """Return one of `choices`; add a problem and return `default` for any other value."""
        value = self.text(name, vendor=vendor)
        if value is None:
            return default
        if value not in choices:
            self.problem(self._place(name, vendor), repr(value), f"one of {', '.join(choices)}", "Choose one of them.")
            return default
        return value

    def _place(self, name: str, vendor: str | None) -> str:
        """Return where a setting was written: a field of the file, or a variable."""
        if vendor is not None:
            return f"vendor.{vendor}.{name}"
        variable = f"KLING_RELAY_{name.upper()}"
        return f"{name} in {CONFIG_FILE}" if name in self.table and not self.environ.get(variable) else variable

    def secret(self, field: str, value: str) -> str | None:
        """Resolve the references `env:NAME` and `file:PATH`; return any other value unchanged."""
        kind, _, rest = value.partition(":")
        if kind == "env":
            if not self.environ.get(rest):
                self.problem(field, value, "an environment variable that is set", f"Set {rest} in the environment.")
            return self.environ.get(rest) or None
        if kind == "file" and not rest.startswith("//"):
            try:
                content = Path(rest).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                self.problem(field, value, "a readable file", f"Correct the path or its permissions: {error}.")
                return None
            if not content:
                self.problem(field, value, "a file that holds the value", "The file is empty: write the value to it.")
            return content or None
        return value

    def secret_setting(self, name: str, variable: str, table: Mapping[str, Any]) -> str | None:
        """Return a key, a token or a comma-separated list of secrets: a variable, else a field of the file's table.

        One that is set but empty is a problem, since it would switch a check off; so is one that no header can hold.
        """
        value, written = self.environ.get(variable), table.get(name)
        if value is None and written is not None:
            value = self.secret(f"{name} in {CONFIG_FILE}", str(written))
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            remedy = "Set it, or remove it. An empty one would mean that nothing is checked or signed."
            self.problem(variable, "set, but empty", "a value", remedy)
        elif not all(part.isascii() and part.isprintable() and " " not in part for part in parts) or "\n" in value:
            self.problem(variable, "[hidden]", "printable ASCII without spaces", "Copy it again, without line ends.")
        else:
            return ",".join(parts)
        return None

    def vendor_table(self, vendor: str) -> Mapping[str, Any]:
        """Return the table `[vendor.<vendor>]`; empty if there is none."""
        vendors = self.table.get("vendor", {})
        table = vendors.get(vendor, {}) if isinstance(vendors, dict) else {}
        return table if isinstance(table, dict) else {}

    def check_names(self, table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        """Add a problem for each unknown name in `table`."""
        for name in table:
            if name not in known:
                self.problem(f"{where}.{name}", "unknown", "a known name", _suggest(name, known))

    def check_environment(self, known: tuple[str, ...]) -> None:
        """Add a problem for each unknown variable KLING_RELAY_..., unless the file refers to it by `env:`."""
        prefix, known = "KLING_RELAY_", ("config", *known)
        for name, value in self.environ.items():
            setting = name.removeprefix(prefix).lower()
            if not name.startswith(prefix) or setting in known or re.search(_OF_KUBERNETES, name):
                continue
            if value and f"env:{name}" not in str(self.table):
                self.problem(name, "unknown", "a known variable", _suggest(setting, known, prefix))

    def finish(self) -> None:
        """Raise InvalidSettings if there are problems."""
        if self.problems:
            raise InvalidSettings(self.problems)


# Kubernetes sets these in every pod for a service whose name begins with kling-relay.
_OF_KUBERNETES = r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"


def _suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return a remedy for an unknown name: the known one that is near it, or all. A `prefix` marks variables."""
    import difflib

    def shown(setting: str) -> str:
        return f"{prefix}{setting.upper()}" if prefix else setting

    near = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {shown(near[0])!r}?" if near else f"Known names: {', '.join(map(shown, known))}."


def open_reader(environ: Mapping[str, str] | None = None) -> Reader:
    """Read the environment and the file in KLING_RELAY_CONFIG (default: relay.toml, if it exists)."""
    environ = os.environ if environ is None else environ
    named = environ.get("KLING_RELAY_CONFIG")
    path = Path(named or CONFIG_FILE)
    if not path.exists() and named is None:
        return Reader(environ, {})
    try:
        return Reader(environ, _read_toml(path.read_text()))
    except (OSError, ValueError) as error:  # of TOML, of UTF-8
        raise InvalidSettings(
            [Problem("KLING_RELAY_CONFIG", str(path), "a readable TOML file", f"Correct the file: {error}.")]
        ) from error


def _read_toml(text: str) -> dict[str, Any]:
    if not text.strip():  # as `make package` leaves it where the environment has every setting
        return {}
    import tomllib  # its patterns take a tenth of what the receiver adds to a cold start

    return tomllib.loads(text)


def read_settings(reader: Reader) -> Settings:
    """Read the settings that submitter and receiver share; `reader.finish()` raises their problems."""
    reader.check_names(reader.table, (*COMMON, *RECEIVER, "vendor", "hook"), CONFIG_FILE)
    reader.check_environment((*COMMON, *RECEIVER))
    ring = None
    keys = reader.secret_setting("keys", "KLING_RELAY_KEYS", reader.table)
    if keys:
        try:
            ring = KeyRing.read(keys)
        except InvalidSettings as error:
            reader.problems.extend(error.problems)
    return Settings(
        public_url=_public_url(reader),
        ledger=reader.text("ledger") or "sqlite:///relay.db",
        ring=ring,
        vendors=_vendors(reader),
        allow_hosts=_allow_hosts(reader),
        media_store=reader.text("media_store"),
    )


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Load the settings of the submitter; raise InvalidSettings with every problem."""
    reader = open_reader(environ)
    settings = read_settings(reader)
    reader.finish()
    return settings


def _allow_hosts(reader: Reader) -> frozenset[str]:
    hosts = frozenset(filter(None, (host.strip().lower() for host in (reader.text("allow_hosts") or "").split(","))))
    for host in sorted(hosts):
        wrong = why_not_host(host)
        if wrong is not None:
            remedy = "Name hosts alone, separated by commas: hooks.internal,10.0.0.7"
            reader.problem("KLING_RELAY_ALLOW_HOSTS", repr(host), f"a host: {wrong}", remedy)
    return hosts


def _public_url(reader: Reader) -> str | None:
    url = reader.text("public_url")
    if not url:
        return None
    wrong = why_not_web(url) or ("it has a query or a fragment" if re.search("[?#]", url) else None)
    if "@" in url.partition("://")[2].partition("/")[0]:
        wrong = "it has a user or a password, which vendors would not send"
    if wrong is not None:
        limit = f"https://host[/path]: {wrong}"
        reader.problem("KLING_RELAY_PUBLIC_URL", repr(without_password(url)), limit, "Set the receiver's public URL.")
    return url.rstrip("/")


def _vendors(reader: Reader) -> dict[str, VendorSettings]:
    known = installed_vendors()
    reader.check_names(reader.table.get("vendor", {}), tuple(known), "vendor")
    vendors = {}
    common = _Common(
        reader.number("poll_after_s", None, least=0.01, most=DELAY_MAX_S),
        reader.number("abandon_after_s", None, least=1),
        reader.number("parallel", None, least=1, whole=True),
    )
    for name, vendor in known.items():
        variables = _variables(reader, name, vendor)
        reader.check_names(reader.vendor_table(name), (*OF_VENDOR, *vendor.names), f"vendor.{name}")
        callbacks = _callbacks(reader, name, vendor.reader)
        try:
            configured = vendor.configure(variables)
        except InvalidSettings as error:
            reader.problems.extend(error.problems)
            continue
        if configured is not None:
            vendors[name] = _vendor(reader, configured, common, callbacks)
    return vendors


def _variables(reader: Reader, name: str, vendor: VendorSetup) -> dict[str, str]:
    """Return what an adapter is configured with: `<VENDOR>_<NAME>`, else `name` in `[vendor.<vendor>]`."""
    table, found = reader.vendor_table(name), {}
    for key in vendor.names:
        variable = f"{name.upper()}_{key.upper()}"
        if key.endswith("_key"):
            value = reader.secret_setting(key, variable, table)
        else:
            value = reader.environ.get(variable)
            if not value and key in table and key != "webhook_secret":  # the receiver reads that
                value = reader.secret(f"vendor.{name}.{key}", str(table[key]))
        if value:
            found[key] = value
    return found


class _Common(msgspec.Struct, frozen=True):
    """The top-level settings that a vendor's table may override."""

    poll_after_s: float | None
    abandon_after_s: float | None
    parallel: float | None


def _vendor(reader: Reader, vendor: Vendor, common: _Common, callbacks: CallbackSetting) -> VendorSettings:
    name, default = vendor.name, vendor.poll_policy
    after_s = reader.number("poll_after_s", common.poll_after_s, vendor=name, least=0.01, most=DELAY_MAX_S)
    parallel = reader.number("parallel", common.parallel, vendor=name, least=1, whole=True)
    while_expected, while_unexpected = default.while_expected, default.while_unexpected
    if after_s is not None:
        while_expected = Backoff(after_s, while_expected.factor, max(while_expected.max_s, after_s))
        while_unexpected = Backoff(
            min(while_unexpected.first_s, after_s), while_unexpected.factor, while_unexpected.max_s
        )
    return VendorSettings(
        vendor=vendor,
        parallel=None if parallel is None else int(parallel),
        poll_policy=PollPolicy(while_expected, while_unexpected, common.abandon_after_s or default.abandon_after_s),
        callbacks=callbacks,
    )


def _callbacks(reader: Reader, name: str, vendor: Vendor) -> CallbackSetting:
    default = vendor.callbacks if vendor.callbacks == "auto" else str(vendor.callbacks).lower()
    chosen = reader.choice("callbacks", ("true", "false", "auto"), default, vendor=name)
    if chosen != "false" and vendor.callbacks is False:
        reader.problem(f"vendor.{name}.callbacks", chosen, f"{name} sends no callbacks", "Remove this setting.")
    return "auto" if chosen == "auto" else chosen == "true"
