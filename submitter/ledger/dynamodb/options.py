"""URL options of the DynamoDB ledger: `dynamodb://table?region=eu-west-1&keep_days=90&shards=8`."""

import os
import re
from urllib.parse import parse_qsl, urlsplit

from submitter.errors import InvalidSettings, Problem
from submitter.ledger.dynamodb.items import DAY_S

SHARDS, SHARDS_MAX = 8, 256
KEEP_DAYS_MIN = 7  # longer than a hook's retry schedule


class Options:
    """The table, its region, the number of shards, and the retention of ended tasks in seconds (None: forever).

    Raises InvalidSettings with every problem of the URL.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.table = parts.netloc
        self.region = (
            options.pop("region", None) or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        )
        shards, keep_days = options.pop("shards", str(SHARDS)), options.pop("keep_days", None)
        problems = []
        if not re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", self.table) or parts.path not in ("", "/"):
            remedy = "Use dynamodb://TABLE?region=REGION."
            problems.append(_problem(f"table {self.table + parts.path!r}", "3 to 255 of A-Z a-z 0-9 _ . -", remedy))
        if self.region is None or not re.fullmatch(r"[a-z0-9-]{3,40}", self.region):
            remedy = "Add ?region=REGION to the URL, or set AWS_REGION."
            problems.append(_problem(f"region {self.region!r}", "an AWS region", remedy))
        if not shards.isdecimal() or not 1 <= int(shards) <= SHARDS_MAX:
            limit = f"1 to {SHARDS_MAX}"
            problems.append(_problem(f"shards {shards!r}", limit, f"Use ?shards={SHARDS}, or leave it out."))
        if keep_days is not None and not (keep_days.isdecimal() and int(keep_days) >= KEEP_DAYS_MIN):
            limit = f"{KEEP_DAYS_MIN} days or more"
            remedy = "Use ?keep_days=90, or leave it out to keep everything."
            problems.append(_problem(f"keep_days {keep_days!r}", limit, remedy))
        if options:
            unknown = f"unknown options {', '.join(sorted(options))}"
            problems.append(_problem(unknown, "region, shards, keep_days", "Remove them from the URL."))
        if problems:
            raise InvalidSettings(problems)
        self.shards = int(shards)
        self.ttl_s = None if keep_days is None else int(keep_days) * DAY_S


def _problem(value: str, limit: str, remedy: str) -> Problem:
    return Problem("KLING_RELAY_LEDGER", value, limit, remedy)
