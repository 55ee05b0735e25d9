"""What a figure was measured on."""

import os
import platform
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "mlx", "mlx-lm", "transformers", "trl", "peft", "numpy")


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, operating system and versions, for people."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    """The model's name, and the units that matter for matrix products."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in named.get("flags", "").split()]
    return f"{named.get('model name', platform.machine())} ({', '.join(units)})"
