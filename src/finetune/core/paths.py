"""Where a run keeps its files. The only place that knows their names."""

import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "MANIFEST.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # beside an adapter or a model: the template that it was tuned with


def cache_directory() -> Path:
    """Where things are kept that can be made again: FT_CACHE_DIR, else `finetune` in the person's cache directory."""
    chosen, base = os.environ.get("FT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return (Path(base) if base else Path.home() / ".cache") / "finetune"


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The layout of one run directory; nothing is created by naming it."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yml"

    @property
    def run_info(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "training.log"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """A relative symbolic link to the checkpoint with the lowest evaluation loss."""
        return self.root / "best"

    @property
    def adapter(self) -> Path:
        """The result of LoRA, in PEFT's layout."""
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        """The result of full fine-tuning: a whole model directory."""
        return self.root / "model"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def report_page(self) -> Path:
        return self.root / "report.html"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"
