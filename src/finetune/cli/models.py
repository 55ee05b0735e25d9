"""`ft models`: what is on this machine, what is in a model, and how to get one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import JsonOption, count, new_group, print_json, print_table, size
from finetune.cli.downloads import download_bar, say_pulled

if TYPE_CHECKING:
    from finetune.workflows.models import DescribedModel

app = new_group()
TITLES = {"lora": "LoRA", "full": "full"}


@app.callback()
def models() -> None:
    """List the models on this machine, say what is in one, and get one from the hub.

    \b
    Examples:
      ft models list
      ft models info demo
      ft models pull HuggingFaceTB/SmolLM2-135M
    """


@app.command("list")
def list_(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIRECTORY]...", help="Directories to look in, besides the carried model and the cache."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the carried model, the Hugging Face cache, and the models in directories.

    \b
    Examples:
      ft models list
      ft models list ~/models --json
    """
    from finetune.workflows.models import list_models

    found = list_models(directories or [])
    if json:
        print_json({"models": [asdict(model) for model in found]})
        return
    rows = [
        (
            model.name,
            model.origin,
            model.model_type or "-",
            count(model.parameters),
            size(model.bytes),
            model.problem or "",
        )
        for model in found
    ]
    print_table(("model", "where", "type", "parameters", "on disk", ""), rows)


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, the name of a cached model, or demo.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank to count the parameters of LoRA for.")] = 16,
    json: JsonOption = False,
) -> None:
    """Show what a model is, how large it is, and what tuning it takes. Nothing is loaded.

    \b
    Examples:
      ft models info demo
      ft models info ~/models/llama --rank 32 --json
    """
    from finetune.workflows.models import model_info

    found = model_info(model, rank=rank)
    if json:
        print_json(_document(found, rank))
        return
    print_table(("", ""), _lines(found, rank))


@app.command()
def pull(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The name of a model on the hub: owner/model.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    json: JsonOption = False,
) -> None:
    """Download a model from the Hugging Face hub into its cache, and check every file against the hub's hashes.

    Weights come as safetensors only; nothing that a model contains is run. Files that are there are not downloaded
    again. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the access token (`hf auth login` or HF_TOKEN) mean what they
    always mean.

    \b
    Examples:
      ft models pull HuggingFaceTB/SmolLM2-135M
      ft models pull Qwen/Qwen3-0.6B --revision main --json
    """
    from finetune.workflows.pull import pull_model

    with download_bar() as bar:
        pulled = pull_model(model, revision=revision, on_start=bar.start, on_bytes=bar.add)
    if json:
        print_json(asdict(pulled))
        return
    say_pulled(pulled)
    typer.echo(f"Tune it: ft train quick {pulled.name} YOUR_DATA")


def _document(found: "DescribedModel", rank: int) -> dict[str, Any]:
    info, memory = found.info, found.memory
    adapter = info.lora_parameters(rank)
    return {
        "name": info.source.name,
        "path": str(info.source.path),
        "model_type": info.source.model_type,
        "context_length": info.source.context_length,
        "vocab_size": info.source.vocab_size,
        "parameters": info.parameters,
        "dtype": info.dtype,
        "quantization_bits": info.bits,
        "bytes_on_disk": info.weight_bytes,
        "chat_template": info.has_chat_template,
        "lora": {
            "rank": rank,
            "modules": len(info.linear_modules),
            "trainable": adapter,
            "frozen": info.parameters,
            "total": info.parameters + adapter,
            "share": adapter / (info.parameters + adapter),
            "adapter_bytes": adapter * 4,
        },
        "memory_bytes": None if memory is None else {method: plan.arrays for method, plan in memory.items()},
    }


def _lines(found: "DescribedModel", rank: int) -> list[tuple[str, str]]:
    from finetune.workflows.models import LENGTH, ROWS

    info, document = found.info, _document(found, rank)
    lora, memory = document["lora"], document["memory_bytes"] or {}
    stored = f"{info.dtype}, {info.bits} bits" if info.bits else info.dtype
    return [
        ("model", document["path"]),
        ("architecture", info.source.model_type),
        ("parameters", f"{info.parameters:,}"),
        ("stored as", f"{stored}, {size(info.weight_bytes)}"),
        ("context", f"{info.source.context_length:,} tokens" if info.source.context_length else "no limit given"),
        ("vocabulary", f"{info.source.vocab_size:,} tokens"),
        ("chat template", "yes" if info.has_chat_template else "no"),
        (
            f"LoRA, rank {rank}",
            f"{lora['trainable']:,} trainable parameters ({lora['share']:.2%}) in {lora['modules']} linear modules",
        ),
        ("adapter file", size(lora["adapter_bytes"])),
        *(
            (f"memory, {TITLES[method]}", f"about {size(peak)} at the peak of steps of {ROWS} rows of {LENGTH} tokens")
            for method, peak in memory.items()
        ),
    ]
