"""When a message was made, and how old it is, though the wall clock may be wrong."""

import contextlib
import secrets
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DAY_S = 86_400
EARLIEST = 1_735_689_600  # 2025-01-01: a clock that shows an earlier time is wrong
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Moment:
    """When a message was made: by a clock that nobody sets, and by the wall clock."""

    boot: str  # the machine's boot
    since_boot: float  # seconds, sleep included
    at: float  # Unix time

    def age_s(self, now: "Moment") -> float:
        """The age in seconds. After another boot it is that of the wall clock; 0 if one of the two
        moments is impossible."""
        if self.boot == now.boot:
            return max(0.0, now.since_boot - self.since_boot) if self.since_boot >= 0 else 0.0
        return max(0.0, now.at - self.at) if self.at > EARLIEST else 0.0

    def is_possible(self, now: "Moment") -> bool:
        """Whether it may have been before ``now``, as far as the clock can be trusted."""
        if self.boot == now.boot:
            return 0 <= self.since_boot <= now.since_boot
        return EARLIEST < self.at < now.at + DAY_S


def present() -> Moment:
    """The present moment."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return Moment(_boot_id(), time.clock_gettime(clock), time.time())


@cache
def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return secrets.token_hex(8)  # not Linux: as if each process had a boot of its own
