"""`ft doctor`: is this machine ready, and if not, what to do."""

from typing import TYPE_CHECKING, Any

import typer

from finetune.cli.console import JsonOption, print_json, print_table, quiet_output, size

if TYPE_CHECKING:
    from finetune.workflows.doctor import Diagnosis


def doctor(json: JsonOption = False) -> None:
    """Check this machine: Python, engines, libraries, memory and disk, each problem with what to do.

    Says which engine a run takes and why, and measures how fast each one that is installed multiplies matrices.
    Leaves with 1 where something stands in the way of training.

    \b
    Examples:
      ft doctor
      ft doctor --json
    """
    from finetune.workflows.doctor import examine

    with quiet_output(json):
        found = examine()
    if json:
        print_json(found.record())
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(1)


def _show(found: "Diagnosis") -> None:
    memory, disk = found.memory, found.disk
    limit = f", {size(memory['container_limit_bytes'])} for this container" if memory["container_limit_bytes"] else ""
    rows = [
        ("finetune", found.finetune),
        ("Python", f"{found.python} on {found.platform}"),
        ("processor", f"{found.cpu['architecture']}, {found.cpu['cores']} cores"),
        ("memory", f"{size(memory['available_bytes'])} free of {size(memory['total_bytes'])}{limit}"),
        ("disk", f"{size(disk['free_bytes'])} free at {disk['directory']}"),
        ("engine", f"{found.engine['name']} ({found.engine['reason']})"),
        *((f"  {engine['name']}", _engine(engine)) for engine in found.engines),
        ("libraries", ", ".join(f"{name} {version or 'missing'}" for name, version in found.libraries.items())),
        ("model cache", f"{found.hugging_face['cache']} ({found.hugging_face['models']} models)"),
        ("network", "never used; HF_HUB_OFFLINE is set" if found.hugging_face["offline"] else "never used by ft"),
    ]
    print_table(("", ""), rows)
    for title, sentences in (("Problems", found.problems), ("Advice", found.advice)):
        if sentences:
            typer.echo(f"\n{title}:")
        for sentence in sentences:
            typer.echo(f"  - {sentence}")
    typer.echo("\nSomething is in the way of training." if found.problems else "\nReady to train.")


def _engine(engine: dict[str, Any]) -> str:
    """Version, device, speed of matrix products, and the type that `model.dtype: auto` takes."""
    if not engine["available"]:
        return "not available"
    speed = ", ".join(f"{rate:,.0f} in {dtype}" for dtype, rate in engine["matmul_gflops"].items())
    return (
        f"{engine['version']} on {engine['device']}; GFLOP/s of a matrix product: {speed}; "
        f"computes 16-bit models in {engine['auto_dtype']}"
    )
