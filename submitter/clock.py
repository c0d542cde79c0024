"""The only reader of time and randomness."""

import random
import secrets
import time
import uuid


class Clock:
    """What the edges pass in to every decision. Tests pass their own."""

    def now_ms(self) -> int:
        """Return Unix milliseconds."""
        return time.time_ns() // 1_000_000

    def now_s(self) -> float:
        """Return Unix seconds."""
        return time.time()

    def chance(self) -> float:
        """Return a number from 0 to 1, for jitter."""
        return random.random()  # noqa: S311 - jitter is no secret

    def new_id(self) -> str:
        """Return a UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits."""
        rand = secrets.randbits(74)
        high, low = rand >> 62, rand & ((1 << 62) - 1)
        return str(uuid.UUID(int=self.now_ms() << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low))

    def new_key(self, size: int) -> bytes:
        """Return `size` random bytes for a key."""
        return secrets.token_bytes(size)
