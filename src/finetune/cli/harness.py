"""`ft harness`: tasks of lm-evaluation-harness on a tuned model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, print_table, quiet_output


def harness(
    *,
    what: Annotated[Path | None, typer.Argument(help="A run's directory, or an adapter's.")] = None,
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names of tasks, with commas between them.")],
    model: answers.Model = None,
    checkpoint: answers.Checkpoint = None,
    tasks_from: Annotated[
        Path | None, typer.Option("--tasks-from", help="A directory of task files (YAML) beside the harness's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first questions of each task.")] = None,
    few_shot: Annotated[
        int | None, typer.Option("--few-shot", help="Examples in front of each question; default: as the task says.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Questions that are read together.")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask in the model's template, as a user would.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="As PyTorch names it: cpu, cuda:0, mps.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all that the harness reports to this JSON file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run EleutherAI's lm-evaluation-harness on a run, an adapter or a model.

    The harness is installed by itself: pip install 'lm_eval[hf]'. It reads the tuned model as one merged model, which
    is deleted afterwards.

    \b
    Examples:
      ft harness outputs/mine --tasks arc_easy,hellaswag --limit 200
      ft harness --model MODEL --tasks arc_easy
      ft harness outputs/mine --tasks my_task --tasks-from tasks/ --chat-template
    """
    from finetune.workflows import harness as workflow

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = workflow.HarnessOptions(names, tasks_from, limit, few_shot, batch_size, chat_template, device)
    with quiet_output(True):
        result = workflow.harness(what, options, model=model, checkpoint=checkpoint, output=output, on_notice=note)
    if json:
        print_json(asdict(result))
        return
    rows = [
        [figure.task, figure.metric, f"{figure.value:.4f}", "" if figure.error is None else f"± {figure.error:.4f}"]
        for figure in result.figures
    ]
    print_table(["task", "metric", "value", "error"], rows)
    if output is not None:
        note(f"Written: {output}")
