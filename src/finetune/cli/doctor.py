"""`ft doctor`: is this machine ready, and if not, what to do."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import JsonOption, print_json, print_table, quiet_output, size

if TYPE_CHECKING:
    from finetune.workflows.doctor import Diagnosis
    from finetune.workflows.self_test import Promise


def doctor(
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", help="Also try what finetune promises, with the demo model, in less than a minute."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check this machine: Python, engines, libraries, memory and disk, each problem with what to do.

    Says which engine a run takes and why, and measures how fast each one that is installed multiplies matrices.
    Leaves with 1 where something stands in the way of training. The self-test checks on each engine that the loss does
    not depend on how rows are cut, that a resumed run equals an uninterrupted one bit for bit, that adapters are read
    back exactly, and that the engines agree.

    \b
    Examples:
      ft doctor
      ft doctor --self-test
      ft doctor --json
    """
    from finetune.workflows.doctor import examine

    with quiet_output(json):
        found = examine()
    if not json:
        _show(found)
    promises = _self_test(json) if self_test else []
    if json:
        print_json({**found.record(), "self_test": [asdict(promise) for promise in promises] if self_test else None})
    if found.problems or not all(promise.kept for promise in promises):
        raise typer.Exit(1)


def _self_test(json: bool) -> list["Promise"]:
    from finetune.workflows.self_test import self_test

    def show(promise: "Promise") -> None:
        typer.echo(f"  {'kept  ' if promise.kept else 'BROKEN'}  {promise.engine}: {promise.promise}")
        typer.echo(f"          {promise.detail}, {promise.seconds:.1f} s")

    with quiet_output(json):
        typer.echo("\nSelf-test:")
        promises = self_test(show)
        broken = sum(not promise.kept for promise in promises)
        typer.echo(
            f"\n{broken} of {len(promises)} promises are broken. Install finetune again with its pinned versions, and "
            "report what stands above."
            if broken
            else f"\nAll {len(promises)} promises are kept."
        )
    return promises


def _show(found: "Diagnosis") -> None:
    memory, disk = found.memory, found.disk
    limit = f", {size(memory['container_limit_bytes'])} for this container" if memory["container_limit_bytes"] else ""
    rows = [
        ("finetune", found.finetune),
        ("Python", f"{found.python} on {found.platform}"),
        ("processor", f"{found.cpu['architecture']}, {found.cpu['cores']} cores"),
        ("memory", f"{size(memory['available_bytes'])} free of {size(memory['total_bytes'])}{limit}"),
        ("disk", f"{size(disk['free_bytes'])} free at {disk['directory']}"),
        ("own cache", f"{size(disk['cache']['bytes'])} in {disk['cache']['directory']} (may be deleted)"),
        ("engine", f"{found.engine['name']} ({found.engine['reason']})"),
        *((f"  {engine['name']}", _engine(engine)) for engine in found.engines),
        ("libraries", ", ".join(f"{name} {version or 'missing'}" for name, version in found.libraries.items())),
        ("model cache", f"{found.hugging_face['cache']} ({found.hugging_face['models']} models)"),
        ("hub", _hub(found.hugging_face)),
    ]
    print_table(("", ""), rows)
    for title, sentences in (("Problems", found.problems), ("Advice", found.advice)):
        if sentences:
            typer.echo(f"\n{title}:")
        for sentence in sentences:
            typer.echo(f"  - {sentence}")
    typer.echo("\nSomething is in the way of training." if found.problems else "\nReady to train.")


def _hub(record: dict[str, Any]) -> str:
    if record["offline"]:
        return f"{record['endpoint']}, not asked: HF_HUB_OFFLINE is set"
    token = "with an access token" if record["token"] else "without an access token"
    return f"{record['endpoint']} {'can' if record['reachable'] else 'cannot'} be reached, {token}"


def _rate(gflops: float) -> str:
    """Whole numbers, but for rates that would look like none."""
    return f"{gflops:,.0f}" if gflops >= 10 else f"{gflops:.1f}"


def _engine(engine: dict[str, Any]) -> str:
    """Version, device, speed of matrix products, and the type that `model.dtype: auto` takes."""
    if not engine["available"]:
        return "not available"
    speed = ", ".join(f"{_rate(rate)} in {dtype}" for dtype, rate in engine["matmul_gflops"].items())
    return (
        f"{engine['version']} on {engine['device']}; GFLOP/s of a matrix product: {speed}; "
        f"computes 16-bit models in {engine['auto_dtype']}"
    )
