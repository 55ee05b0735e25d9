"""`ft dataset`: look at a file of examples before training on it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import JsonOption, new_group, note, print_json, print_table
from finetune.cli.downloads import download_bar, say_pulled
from finetune.cli.rows import ShowOption, print_rows, rows_document

if TYPE_CHECKING:
    from finetune.workflows.dataset import InspectedRow, Inspection

app = new_group()

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A data file, or a directory of them.")]
TemplateOption = Annotated[str | None, typer.Option(help="A template by name or file; default: as in training.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=COLUMN", help="The file's column for a known field; may be repeated."),
]


@app.callback()
def dataset() -> None:
    """Look at a file of examples: what is in it, what the model sees, what is wrong; get a data set from the hub.

    \b
    Examples:
      ft dataset info examples.jsonl
      ft dataset check examples.jsonl --model demo
      ft dataset inspect examples.jsonl --model demo
    """


@app.command()
def info(
    file: FileArgument,
    *,
    model: Annotated[str | None, typer.Option(help="Measure the rows in this model's tokens too.")] = None,
    template: TemplateOption = None,
    column: ColumnOption = None,
    show: ShowOption = False,
    json: JsonOption = False,
) -> None:
    """Say what a file holds: format, rows, labels, duplicates, lengths, and each bad row with its line.

    \b
    Examples:
      ft dataset info examples.jsonl
      ft dataset info reviews.csv --column prompt=text --column completion=category --json
      ft dataset info examples.jsonl --model demo --show
    """
    from finetune.workflows.dataset import dataset_info

    found = dataset_info(file, columns=_columns(column), model=model, template=template)
    if json:
        print_json({**found.record, **(rows_document(found.left_out) if show else {})})
        return
    _print_info(found.record)
    if show:
        print_rows(found.left_out)


@app.command()
def pull(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="hf://datasets/owner/name, with @revision and /path if wanted.")
    ],
    json: JsonOption = False,
) -> None:
    """Download the data files of a data set on the Hugging Face hub, and check them against the hub's hashes.

    Without a path these are its training rows: the files that have train in their name, or else all data files.
    `data.train_file` takes such addresses too. No code of a data set is run.

    \b
    Examples:
      ft dataset pull hf://datasets/openai/gsm8k/main
      ft dataset pull tatsu-lab/alpaca --json
    """
    from finetune.workflows.pull import pull_data

    with download_bar() as bar:
        pulled = pull_data(address, on_start=bar.start, on_bytes=bar.add)
    if json:
        print_json(asdict(pulled))
        return
    say_pulled(pulled)
    for file in pulled.files:
        typer.echo(f"Look at it: ft dataset info {file}")


@app.command()
def prepare(
    file: FileArgument,
    *,
    output: Annotated[Path, typer.Option(help="The JSONL file to write; it must not exist.")],
    split: Annotated[float, typer.Option(min=0, max=0.9, help="Share of rows for OUTPUT-validation.jsonl.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 42,
    max_error_rate: Annotated[float, typer.Option(min=0, max=1, help="More bad rows than this fail.")] = 0.05,
    column: ColumnOption = None,
    json: JsonOption = False,
) -> None:
    """Write a clean copy: OpenAI messages, one row a line, each row once; optionally split in two.

    \b
    Examples:
      ft dataset prepare alpaca.json --output clean.jsonl
      ft dataset prepare chats.jsonl --output train.jsonl --split 0.1
    """
    from finetune.workflows.dataset import prepare_dataset

    written = prepare_dataset(
        file, output, columns=_columns(column), split=split, seed=seed, max_error_rate=max_error_rate
    )
    if json:
        print_json(
            {
                "files": written.files,
                "read": written.read,
                "duplicates": written.duplicates,
                "dropped": written.dropped,
            }
        )
        return
    for path, rows in written.files.items():
        typer.echo(f"{path}: {rows:,} rows")
    typer.echo(f"{written.read:,} rows read, {written.duplicates:,} exact duplicates left out.")
    for problem in written.dropped:
        note(f"dropped {problem}")


@app.command()
def check(
    file: FileArgument,
    *,
    validation: Annotated[str | None, typer.Option(help="Look for its requests among the rows of FILE.")] = None,
    model: Annotated[str | None, typer.Option(help="Also check what this model's template and tokenizer do.")] = None,
    template: TemplateOption = None,
    show: Annotated[int, typer.Option(min=0, help="Findings to show of each kind.")] = 3,
    column: ColumnOption = None,
    json: JsonOption = False,
) -> None:
    """Look for what is suspicious in rows that are well formed; nothing is changed.

    Conflicting labels and answers, copies and near copies, validation rows that are trained on too, messages that the
    template changes, characters that the tokenizer cannot give back.

    \b
    Examples:
      ft dataset check examples.jsonl
      ft dataset check train.jsonl --validation test.jsonl --model demo --show 10
    """
    from finetune.workflows.check_data import check_data

    found = check_data(
        file,
        validation=validation,
        model=model,
        template=template,
        columns=_columns(column),
        most=None if json else show,
    )
    if json:
        print_json(asdict(found))
        return
    typer.echo(f"{found.rows:,} rows, of which {len(found.unusable):,} cannot be used")
    for kind in found.checks:
        typer.echo(f"\n{kind.name}: {kind.count:,}")
        for finding in kind.findings:
            more = f" and {finding.more:,} more" if finding.more else ""
            typer.echo(f"  {', '.join(finding.rows)}{more}: {finding.detail}")
        if kind.count > show:
            typer.echo(f"  and {kind.count - show:,} more (--show {kind.count} lists all)")
        if kind.count:
            typer.echo(f"  {kind.advice}")


@app.command()
def inspect(
    file: FileArgument,
    *,
    model: Annotated[str, typer.Option(help="The model whose tokenizer and template to use.")] = "demo",
    template: TemplateOption = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    train_on_prompt: Annotated[bool, typer.Option(help="As data.train_on_prompt.")] = False,
    column: ColumnOption = None,
    json: JsonOption = False,
) -> None:
    """Show rows as the model will see them: trained and untrained tokens in different colours.

    \b
    Examples:
      ft dataset inspect examples.jsonl --model demo
      ft dataset inspect examples.jsonl --model ~/models/llama --template chatml --rows 1 --json
    """
    from finetune.workflows.dataset import inspect_dataset

    shown = inspect_dataset(
        file,
        model=model,
        template=template,
        columns=_columns(column),
        rows=rows,
        train_on_prompt=train_on_prompt,
    )
    if json:
        print_json({"template": shown.template, "rows": [_row_document(row) for row in shown.rows]})
    else:
        _print_rows(shown)
    for error in shown.errors:
        note(error)


@app.command()
def template(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A template's name or .jinja file.")] = None,
    model: Annotated[str | None, typer.Option(help="Render with this model's special tokens.")] = None,
    json: JsonOption = False,
) -> None:
    """List the templates, or show one and what it makes of an example.

    \b
    Examples:
      ft dataset template
      ft dataset template chatml
      ft dataset template tokenizer --model ~/models/qwen3
    """
    from finetune.workflows.templates import list_templates, show_template

    if name is None:
        known = list_templates()
        if json:
            print_json({"templates": known})
        else:
            print_table(("template", "from"), list(known.items()))
        return
    shown = show_template(name, model=model)
    if json:
        print_json({"name": shown.name, "source": shown.source, "rendered": shown.rendered, "turn_end": shown.turn_end})
        return
    typer.echo(f"--- {shown.name}: source\n{shown.source}\n--- an example\n{shown.rendered}")
    typer.echo(f"--- a prompt\n{shown.prompt}\n--- an answer ends with {shown.turn_end!r}")


def _columns(pairs: list[str] | None) -> dict[str, str]:
    from finetune.core.errors import UsageError

    wrong = [pair for pair in pairs or [] if "=" not in pair]
    if wrong:
        raise UsageError(f"--column {wrong[0]}: give FIELD=COLUMN, for example --column prompt=question.")
    return dict(pair.split("=", 1) for pair in pairs or [])


def _print_info(found: dict[str, Any]) -> None:
    labels = {name: count for name, count in found["labels"].items() if count}
    lines = [
        ("file", found["path"]),
        ("format", f"{found['format']}, {found['encoding']}"),
        ("rows are", found["description"]),
        ("rows", f"{found['rows']:,}, of which {found['usable_rows']:,} can be used"),
        ("exact duplicates", f"{found['duplicates']:,}"),
        ("labels", ", ".join(f"{count:,} {name}" for name, count in labels.items()) or "none"),
        ("same request, both labels", f"{found['conflicts']:,}"),
        ("columns not used", ", ".join(f"{n} ({c:,} rows)" for n, c in found["unused_columns"].items()) or "none"),
    ]
    # Where the template refuses every row, there are no lengths in tokens.
    measured = [unit for unit in ("characters", "tokens") if "median" in (found[unit] or {})]
    lines += [(unit, _lengths_line(found[unit])) for unit in measured]
    print_table(("", ""), lines)
    if measured:
        _print_histogram(found[measured[-1]], measured[-1])
    if found["errors"]:
        typer.echo(f"\n{len(found['errors']):,} rows cannot be used ({found['error_rate']:.1%}):")
        for error in found["errors"][:20]:
            typer.echo(f"  {error['file']}:{error['line']}: {error['reason']}")
        if len(found["errors"]) > 20:
            typer.echo(f"  and {len(found['errors']) - 20:,} more (--json lists all)")


def _lengths_line(lengths: dict[str, Any]) -> str:
    line = (
        f"median {lengths['median']:,}, 95 % {lengths['p95']:,}, 99 % {lengths['p99']:,}, most {lengths['longest']:,}"
    )
    if "template" not in lengths:
        return line
    return f"{line} (template {lengths['template']}); recommended max_length {lengths['recommended_max_length']:,}"


def _print_histogram(lengths: dict[str, Any], unit: str) -> None:
    most = max(entry["rows"] for entry in lengths["histogram"])
    typer.echo(f"\nrows by {unit}")
    for entry in lengths["histogram"]:
        bar = "█" * max(1, round(40 * entry["rows"] / most))
        typer.echo(f"  up to {entry['up_to']:>7,}  {bar} {entry['rows']:,}")


def _row_document(row: "InspectedRow") -> dict[str, Any]:
    return {
        "origin": row.origin,
        "label": row.label,
        "tokens": row.tokens,
        "token_texts": row.token_texts,
        "mask": row.mask,
        "trained_tokens": sum(row.mask),
    }


def _print_rows(shown: "Inspection") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    coloured = console.is_terminal
    console.print(
        Text.assemble(f"template {shown.template}    ", *_piece("trained", True, coloured), "  not trained  ")
    )
    for row in shown.rows:
        label = {True: ", desirable", False: ", undesirable", None: ""}[row.label]
        trained = sum(row.mask)
        console.print(f"\n── {row.origin}{label}: {len(row.tokens):,} tokens, {trained:,} trained", markup=False)
        text = Text()
        for segment in row.segments:
            for part in _piece(segment.text, segment.trained, coloured):
                text.append(part) if isinstance(part, str) else text.append(*part)
        text.highlight_words(sorted(shown.special_tokens), "bold magenta")
        console.print(text)


def _piece(text: str, trained: bool, coloured: bool) -> list[Any]:
    """One stretch of text: green where it is trained on; between ⟦ and ⟧ where there are no colours."""
    if coloured:
        return [(text, "bold green" if trained else "dim")]
    return [f"⟦{text}⟧" if trained else text]
