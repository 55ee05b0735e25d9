"""The facts of a model card, gathered from an adapter's configuration and from what its run left on disk."""

import json
from typing import Any

from finetune.adapters.store import read_adapter_config
from finetune.core.paths import RunPaths
from finetune.export.card import CardFacts
from finetune.export.formats import ExportFormat
from finetune.export.verify import Comparison
from finetune.workflows.opening import trained_template
from finetune.workflows.subjects import Run, Subject


def card_facts(
    subject: Subject, *, format: ExportFormat, title: str, base: str, comparison: Comparison | None
) -> CardFacts:
    """What is known; a bare adapter has no data and no figures."""
    report = {} if subject.run is None else _report(subject.run.paths)
    return CardFacts(
        title=title,
        format=format,
        base=base,
        method=_method(subject),
        comparison=comparison,
        data={} if subject.run is None else _data(subject.run, report),
        figures=_figures(report),
        template=trained_template(subject),
    )


def _report(paths: RunPaths) -> dict[str, Any]:
    """`report.json`; empty for a run that was stopped before it was written."""
    if not paths.report.is_file():
        return {}
    document = json.loads(paths.report.read_text(encoding="utf-8"))
    return document if isinstance(document, dict) else {}


def _method(subject: Subject) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if subject.adapter is None:
        facts["method"] = "full fine-tuning"
    else:
        adapter = read_adapter_config(subject.adapter)
        targets = adapter.target_modules
        name = "DoRA" if adapter.use_dora else "LoRA"
        facts["method"] = name + (" (rsLoRA scaling)" if adapter.use_rslora else "")
        facts["rank"] = adapter.rank
        facts["alpha"] = adapter.alpha
        facts["target modules"] = targets if isinstance(targets, str) else ", ".join(targets)
    facts["checkpoint"] = subject.checkpoint
    if subject.run is not None:
        training = subject.run.config.training
        facts["learning rate"] = training.learning_rate
        facts["rows a step"] = training.rows_per_step
        facts["seed"] = training.seed
    return facts


def _data(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    files = run.config.data.train_file
    names = [files] if isinstance(files, str) else [item if isinstance(item, str) else item.path for item in files]
    rows = report.get("rows", {})
    counts = {f"rows {name}": rows[name] for name in ("read", "trained", "dropped", "truncated") if name in rows}
    return {"files": ", ".join(name.rsplit("/", 1)[-1] for name in names), **counts}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    labels = {
        "steps": "steps",
        "epochs": "epochs",
        "tokens_trained": "trained tokens",
        "initial_eval_loss": "evaluation loss before",
        "best_eval_loss": "evaluation loss, best",
        "perplexity": "perplexity",
        "training_time_seconds": "seconds of training",
    }
    return {label: report[key] for key, label in labels.items() if report.get(key) is not None}
