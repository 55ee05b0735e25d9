"""`ft train`: tune, resume, check a configuration. Option help comes from the schema, where options are documented."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import (
    JsonOption,
    note,
    option_help,
    print_json,
    print_table,
    quiet_output,
)
from finetune.cli.rows import ShowOption, print_rows, rows_document
from finetune.config.layers import profile_names
from finetune.config.load import DEFAULT_CONFIG, LoadedConfig, load_config
from finetune.core.errors import UsageError

if TYPE_CHECKING:
    from finetune.workflows.train import TrainingResult
    from finetune.workflows.validate import Validation

app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)

# Parameter of a command to key of the configuration. All of them are "not given" when they are None.
FLAGS: Mapping[str, str] = {
    "model": "model.name",
    "data": "data.train_file",
    "template": "data.template",
    "epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "lora_rank": "lora.rank",
    "method": "training.method",
    "backend": "model.backend",
    "device": "model.device",
    "quantization": "model.quantization",
    "packing": "training.packing",
    "from_adapter": "lora.init_from",
    "max_length": "data.max_length",
    "output": "output.output_dir",
    "seed": "training.seed",
}


def _flag(name: str, metavar: str) -> Any:
    key = FLAGS[name.removeprefix("--").replace("-", "_")]
    return typer.Option(name, metavar=metavar, help=option_help(key), show_default=False)


Model = Annotated[str, typer.Argument(metavar="MODEL", help=option_help("model.name"), show_default=False)]
Data = Annotated[str, typer.Argument(metavar="DATA", help=option_help("data.train_file"), show_default=False)]
Template = Annotated[str | None, _flag("--template", "NAME")]
Epochs = Annotated[float | None, _flag("--epochs", "E")]
MaxSteps = Annotated[int | None, _flag("--max-steps", "N")]
BatchSize = Annotated[str | None, _flag("--batch-size", "N|auto")]
LearningRate = Annotated[float | None, _flag("--learning-rate", "X")]
LoraRank = Annotated[int | None, _flag("--lora-rank", "R")]
Method = Annotated[str | None, _flag("--method", "lora|dora|full")]
Backend = Annotated[str | None, _flag("--backend", "auto|mlx|pytorch")]
Device = Annotated[str | None, _flag("--device", "auto|cpu|cuda|metal")]
Quantization = Annotated[str | None, _flag("--quantization", "4bit|8bit")]
Packing = Annotated[
    bool | None, typer.Option("--packing/--no-packing", help=option_help("training.packing"), show_default=False)
]
FromAdapter = Annotated[str | None, _flag("--from-adapter", "ADAPTER")]
MaxLength = Annotated[int | None, _flag("--max-length", "N")]
Output = Annotated[str | None, _flag("--output", "DIR")]
Seed = Annotated[int | None, _flag("--seed", "S")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A configuration file.")]
Profile = Annotated[
    str | None, typer.Option("--profile", metavar="P", help=f"Values to start from: {', '.join(profile_names())}.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set any option of the configuration; may be repeated."),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN|CHECKPOINT", help="Go on where a run stopped, bit for bit.")
]


@app.callback()
def train(
    context: typer.Context,
    *,
    config: Config = None,
    model: Annotated[str | None, _flag("--model", "MODEL")] = None,
    data: Annotated[str | None, _flag("--data", "DATA")] = None,
    profile: Profile = None,
    backend: Backend = None,
    from_adapter: FromAdapter = None,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = None,
    json: JsonOption = False,
) -> None:
    """Tune a model as a configuration says: config/train.yml, --config FILE, or --model and --data.

    \b
    Examples:
      ft train
      ft train --config my.yml --set training.learning_rate=1e-4
      ft train --model demo --data examples.jsonl --output outputs/first
      ft train --resume outputs/first
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced(context)
    elif resume is not None and not _given(context.params, ignore={"resume", "overrides", "json"}):
        _resume(resume, overrides or (), json=json)
    else:
        _run(_load(context.params, _config_file(config, model, data)), resume=resume, json=json)


def _given(parameters: Mapping[str, Any], *, ignore: set[str]) -> list[str]:
    return [name for name, value in parameters.items() if value and name not in ignore]


def _refuse_misplaced(context: typer.Context) -> None:
    """An option before `start` would be read and forgotten."""
    misplaced = _given(context.params, ignore=set())
    if misplaced:
        names = ", ".join("--set" if name == "overrides" else f"--{name.replace('_', '-')}" for name in misplaced)
        command = context.invoked_subcommand
        raise UsageError(f"{names} before `{command}` has no effect. Put it after: ft train {command} ... {names} ...")


def _config_file(config: Path | None, model: str | None, data: str | None) -> Path | None:
    if config is not None:
        return config
    if model and data:
        if DEFAULT_CONFIG.is_file():
            note(f"{DEFAULT_CONFIG} is not read, because --model and --data are given. Add --config to use it.")
        return None
    if DEFAULT_CONFIG.is_file():
        return DEFAULT_CONFIG
    raise UsageError(
        f"There is no {DEFAULT_CONFIG} here, so it is not clear what to train. "
        "Give --config FILE, or --model MODEL --data DATA, or use: ft train start MODEL DATA"
    )


@app.command()
def start(
    context: typer.Context,
    *,
    model: Model,
    data: Data,
    config: Config = None,
    profile: Profile = None,
    template: Template = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    lora_rank: LoraRank = None,
    method: Method = None,
    backend: Backend = None,
    device: Device = None,
    quantization: Quantization = None,
    packing: Packing = None,
    from_adapter: FromAdapter = None,
    max_length: MaxLength = None,
    output: Output = None,
    seed: Seed = None,
    overrides: Overrides = None,
    resume: Resume = None,
    json: JsonOption = False,
) -> None:
    """Tune MODEL on DATA.

    \b
    Examples:
      ft train start demo examples.jsonl
      ft train start ~/models/llama data/train.jsonl --profile chat --epochs 3 --lora-rank 16
      ft train start ~/models/llama data/train.jsonl --method dora --quantization 4bit
      ft train start demo examples.jsonl --from-adapter outputs/first/adapter
      ft train start demo examples.jsonl --set lora.alpha=32 --set output.eval_steps=20 --json
    """
    _run(_load(context.params, config), resume=resume, json=json)


@app.command()
def quick(
    context: typer.Context,
    *,
    model: Model,
    data: Data,
    template: Template = None,
    max_steps: MaxSteps = None,
    backend: Backend = None,
    max_length: MaxLength = None,
    output: Output = None,
    seed: Seed = None,
    overrides: Overrides = None,
    json: JsonOption = False,
) -> None:
    """Take a first look in a minute or two: few small steps, to see whether the loss falls.

    \b
    Examples:
      ft train quick demo examples.jsonl
      ft train quick ~/models/llama data/train.jsonl --max-steps 20
    """
    _run(_load({**context.params, "profile": "quick"}, None), resume=None, json=json)


@app.command()
def validate(
    context: typer.Context,
    *,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration file.", show_default=False)],
    profile: Profile = None,
    overrides: Overrides = None,
    show: ShowOption = False,
    json: JsonOption = False,
) -> None:
    """Check a configuration and its data, count rows and steps, and give advice. No weights are loaded.

    \b
    Examples:
      ft train validate config/train.yml
      ft train validate my.yml --set data.max_length=1024 --show
    """
    from finetune.workflows.validate import validate_run

    with quiet_output(json):
        found = validate_run(_load(context.params, config))
    if json:
        print_json({**found.record(), **(rows_document(found.prepared.data.left_out) if show else {})})
        return
    _show_validation(found)
    if show:
        print_rows(found.prepared.data.left_out)


@app.command()
def schema() -> None:
    """Print the JSON schema of configuration files, for editors.

    \b
    Example:
      ft train schema > train.schema.json
    """
    from finetune.config.dump import json_schema

    print_json(json_schema())


def _load(parameters: Mapping[str, Any], path: Path | None) -> LoadedConfig:
    """The configuration that a command line asks for."""
    flags = {key: parameters.get(name) for name, key in FLAGS.items()}
    rows = flags["training.batch_size"]
    if rows is not None and rows.lstrip("-").isdigit():
        flags["training.batch_size"] = int(rows)
    return load_config(
        path, profile=parameters.get("profile"), overrides=parameters.get("overrides") or (), flags=flags
    )


def _run(loaded: LoadedConfig, *, resume: Path | None, json: bool) -> None:
    from finetune.tracking.console import ConsoleListener
    from finetune.workflows.train import train as run_training

    with quiet_output(json), ConsoleListener(stderr=json) as listener:
        result = run_training(loaded, listeners=[listener], resume=resume)
    _show(result, json=json)


def _resume(path: Path, overrides: Sequence[str], *, json: bool) -> None:
    from finetune.tracking.console import ConsoleListener
    from finetune.workflows.train import resume as resume_training

    with quiet_output(json), ConsoleListener(stderr=json) as listener:
        result = resume_training(path, overrides=overrides, listeners=[listener])
    _show(result, json=json)


def _show(result: "TrainingResult", *, json: bool) -> None:
    if json:
        print_json({"run_dir": str(result.run_dir), **result.metrics})
        return
    report = result.metrics
    rows = [("loss", f"{result.final_loss:.4f} at the end of training")]
    if report["final_eval_loss"] is not None:
        best = report["best_eval_loss"]
        after = "not finite since" if best is None else f"{best:.4f} at best"
        rows.append(("evaluation", f"loss {report['initial_eval_loss']:.4f} before, {after}"))
        rows.append(("perplexity", f"{result.perplexity:.2f}"))
    rows += [
        ("time", f"{result.training_time:.1f} s"),
        ("peak memory", f"{result.peak_memory_gb:.2f} GB"),
        ("report", str(result.run_dir / "report.html")),
    ]
    print_table(("", ""), rows)
    typer.echo(f"\nNext: ft evaluate {result.run_dir}   compares the base with what was trained")


def _show_validation(found: "Validation") -> None:
    data, plan = found.prepared.data, found.prepared.plan
    rows, packing = data.report.rows, found.prepared.config.training.packing
    lines = [
        ("model", f"{found.prepared.source.path} ({found.prepared.source.model_type})"),
        ("engine", str(found.prepared.choice)),
        ("device", f"{found.prepared.device}, {found.prepared.dtype}"),
        ("rows", f"{rows.read:,} read, {len(data.train):,} to train on, {len(data.validation):,} to validate on"),
        ("evaluation", f"{len(found.prepared.evaluated):,} rows, {plan.evaluations} times"),
        ("left out", f"{rows.dropped:,} dropped, {rows.duplicates:,} duplicates, {rows.undesirable:,} undesirable"),
        ("length", f"at most {data.max_length:,} tokens; {rows.truncated:,} rows are cut"),
        ("packing", "rows end to end" if packing else "rows side by side"),
        ("template", data.template.name),
        ("steps", f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch)"),
    ]
    if found.trainable is not None:
        lines.append(("trainable", f"{found.trainable:,} parameters"))
    print_table(("", ""), lines)
    typer.echo(f"\n{found.memory_sentence}")
    _list("Values that were not given", found.notices)
    _list("Advice", found.advice)
    typer.echo("\nThe configuration and the data are in order.")


def _list(title: str, sentences: Sequence[str]) -> None:
    if sentences:
        typer.echo(f"\n{title}:")
    for sentence in sentences:
        typer.echo(f"  - {sentence}")
