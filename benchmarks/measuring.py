"""What every run reports, and how a process reads its own clock and peak memory."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

WARM_UP = 2  # steps that no rate counts: first allocations, compiled kernels


@dataclass(slots=True)
class StepClock:
    """Seconds and losses of the steps of one run."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def step(self, loss: float) -> None:
        """A step has just ended."""
        self.losses.append(loss)
        self.ends.append(time.perf_counter())

    def report(self) -> None:
        """Print the run as one JSON line: seconds of the steps after the warm-up, losses, peak memory."""
        seconds = self.ends[-1] - self.ends[WARM_UP - 1]
        print(json.dumps(asdict(Run(seconds, self.losses, peak_memory_bytes()))))


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one side. `seconds` cover the steps after the first two."""

    seconds: float
    losses: list[float]
    peak_bytes: int


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would start from the size of the process that this one was forked from
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
