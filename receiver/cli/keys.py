"""`kling-relay keys`: generate and rotate callback URL keys, and generate webhook secrets."""

import base64
from datetime import UTC, datetime

import click

from submitter.callback_url import KEY_BYTES
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.settings import load_settings


@click.group()
def keys() -> None:
    """Generate callback URL keys and webhook secrets."""


@keys.command("new")
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["callbacks", "hook", "v1a"]),
    default="callbacks",
    show_default=True,
    help="callbacks: KLING_RELAY_KEYS. hook: whsec_ secret (HMAC-SHA256). v1a: whsk_ secret (Ed25519) and whpk_ key.",
)
@click.option(
    "--rotate",
    is_flag=True,
    help="Put the new key before those in KLING_RELAY_KEYS: it signs, all verify. Drop the old keys after 30 days.",
)
def keys_new(purpose: str, rotate: bool) -> None:
    """Generate a key or secret, and print it.

    Without --for: KLING_RELAY_KEYS, as a line for your environment. These keys sign and verify
    callback URLs, and anyone who has them can forge callbacks. Give submitters and `serve` the same
    value, and keep it: the callback URLs of running tasks were signed with it.

    \b
      kling-relay keys new >> .env
      kling-relay keys new --rotate            new key first, old keys still verify
      kling-relay keys new --for hook          secret for one hook's `secret` setting
    """
    from receiver.signature import public_key, read_secret

    clock = Clock()
    secret = base64.b64encode(clock.new_key(KEY_BYTES)).decode()
    if purpose == "hook":
        click.echo(f"whsec_{secret}")
        return
    if purpose == "v1a":
        click.echo(f"whsk_{secret}")
        click.echo(f"public key for consumers: {public_key(read_secret('new', f'whsk_{secret}'))}", err=True)
        return
    old = load_settings().ring if rotate else None
    if rotate and old is None:
        remedy = "Run it with the environment of `serve`, or leave out --rotate."
        raise InvalidSettings([Problem("KLING_RELAY_KEYS", "not set", "the keys to rotate", remedy)])
    taken = {key.id for key in old.keys} if old else set()
    id = datetime.fromtimestamp(clock.now_s(), UTC).strftime("k%Y%m%d")
    id = next(name for name in (id, *(f"{id}-{n}" for n in range(2, 1000))) if name not in taken)
    rest = [f"{key.id}:{base64.b64encode(key.secret).decode()}" for key in old.keys] if old else []
    click.echo("KLING_RELAY_KEYS=" + ",".join([f"{id}:{secret}", *rest]))
    if rotate:
        click.echo(
            "Next: set this for `serve` first, then for every submitter, and restart them. Callback URLs that the old"
            " key signed stay valid for 30 days: remove it after that, by the same two steps.",
            err=True,
        )
