"""`ft train`: tune a model on a data set as a configuration says, or go on with a run that was stopped."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.adapters.lora import seeded_init
from finetune.config.dump import dump_config
from finetune.config.load import LoadedConfig, load_config, plain
from finetune.config.schema import RunConfig
from finetune.core.errors import StoppedBySignal, UsageError
from finetune.core.events import Event, Listener, Notice, RunFinished, RunStarted
from finetune.core.files import write_atomically
from finetune.core.machine import free_addresses
from finetune.core.paths import RunPaths
from finetune.engines.base import TrainSession
from finetune.planning.cuts import SETTLED
from finetune.planning.memory import MemoryPlan
from finetune.tracking.metrics_log import MetricsLog, to_text
from finetune.tracking.plots import take_addresses
from finetune.tracking.sinks import Broadcast
from finetune.tracking.text_log import TextLog
from finetune.training.checkpoints import Checkpoints
from finetune.training.run_directory import check_new, create, held, locate
from finetune.training.signals import StopRequest, end_on_sigterm, stop_on_signals
from finetune.training.trainer import Outcome, Trainer
from finetune.workflows.auto_batch import settle_batch
from finetune.workflows.memory import memory_plan, memory_sentence, memory_warning
from finetune.workflows.preparation import Preparation, prepare
from finetune.workflows.pull import OnNotice, bring
from finetune.workflows.record import run_record
from finetune.workflows.results import Finisher
from finetune.workflows.resuming import StartingPoint, find_starting_point, refuse_changes, rewind
from finetune.workflows.starting_adapter import starting_notices
from finetune.workflows.validation import validation_of


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run did and left. Losses in nats per trained token; NaN where the run has no such figure."""

    run_dir: Path
    final_loss: float  # training loss of the last step
    perplexity: float  # of the result, on the validation rows
    training_time: float  # seconds
    peak_memory_gb: float
    metrics: Mapping[str, Any]  # report.json
    adapter: Path | None  # the result of LoRA
    model: Path | None  # the result of full fine-tuning


def train(
    config: RunConfig | LoadedConfig | Mapping[str, Mapping[str, Any]] | Path | str,
    *,
    listeners: Sequence[Listener] = (),
    resume: Path | None = None,
) -> TrainingResult:
    """Tune a model on a data set as `config` says, and leave the result in `output.output_dir`.

    `config` is a configuration, a mapping in the shape of its file, or the path of a file.
    With `resume` (a run or one of its checkpoints) go on there instead, if `config` still means the same steps.
    Ctrl-C and SIGTERM save a checkpoint and raise StoppedBySignal. Raises other FinetuneErrors for all that a
    person can put right; what is wrong with the configuration, the data or the model leaves nothing behind.
    """
    loaded = _loaded(config)
    if free_addresses() is not None:
        take_addresses()
    if resume is not None:
        return _go_on(loaded, resume, listeners)
    settings = plain(loaded)
    directory = Path(settings.output.output_dir or _default_directory(settings)).expanduser()
    check_new(directory)
    loaded = bring(loaded, _said_by(listeners))
    said: list[Event] = []
    listen = Broadcast([said.append, *listeners])
    with end_on_sigterm():
        prepared = settle_batch(prepare(loaded), tries=True, say=_said_by([listen]))
    memory = _announce_memory(prepared, listen)
    with _open_session(prepared, memory) as session:
        paths = create(directory, lambda new: _write_inputs(new, prepared))
        with held(paths):
            run = _Run(paths, prepared, session, listeners, memory)
            return run.go(None, said=said, notices=_notices(prepared, session))


def resume(run: Path | str, *, overrides: Sequence[str] = (), listeners: Sequence[Listener] = ()) -> TrainingResult:
    """Go on with a run (its latest whole checkpoint) or from one checkpoint of it, bit for bit.

    `overrides` are `section.key=value`; `training.compatibility.MAY_CHANGE` lists what they may change.
    """
    paths, _ = locate(Path(run))
    return train(load_config(paths.config, environ={}, overrides=overrides), listeners=listeners, resume=Path(run))


def _loaded(
    config: RunConfig | LoadedConfig | Mapping[str, Mapping[str, Any]] | Path | str,
) -> RunConfig | LoadedConfig:
    match config:
        case RunConfig() | LoadedConfig():
            return config
        case str() | Path():
            return load_config(Path(config))
        case _:
            flat = [section for section, values in config.items() if not isinstance(values, Mapping)]
            if flat:
                raise UsageError(
                    f"{', '.join(flat)}: give a mapping of options, for example {{'model': {{'name': 'demo'}}}}."
                )
            flags = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
            return load_config(None, environ={}, flags=flags)


def _go_on(loaded: RunConfig | LoadedConfig, resume: Path, listeners: Sequence[Listener]) -> TrainingResult:
    paths, chosen = locate(resume)
    loaded = bring(loaded, _said_by(listeners))
    prepared = prepare(_settled_as_started(loaded, paths))
    warnings = refuse_changes(paths, prepared)
    said: list[Event] = []
    memory = _announce_memory(prepared, Broadcast([said.append, *listeners]))
    with held(paths), _open_session(prepared, memory) as session:
        checkpoints = Checkpoints(paths, prepared.config.output.keep_checkpoints)
        checkpoints.clean()
        start = find_starting_point(paths, checkpoints, chosen, warnings.append)
        rewind(paths, checkpoints, start)
        notices = [
            Notice(level="info", message=prepared.engine_notice()),
            *(Notice(level="warning", message=message) for message in warnings),
        ]
        return _Run(paths, prepared, session, listeners, memory).go(start, said=said, notices=notices)


def _settled_as_started(given: RunConfig | LoadedConfig, paths: RunPaths) -> RunConfig | LoadedConfig:
    """With what `batch_size: auto` came to when the run was started."""
    config = plain(given)
    if config.training.batch_size != "auto":
        return given
    started = load_config(paths.config, environ={}).config.training
    update = {key: getattr(started, key) for key in SETTLED}
    config = config.model_copy(update={"training": config.training.model_copy(update=update)})
    return replace(given, config=config) if isinstance(given, LoadedConfig) else config


def _announce_memory(prepared: Preparation, listener: Listener) -> MemoryPlan | None:
    """The plan, told before weights are loaded."""
    plan = memory_plan(prepared)
    listener(Notice(level="info", message=memory_sentence(plan, prepared)))
    if warning := memory_warning(plan, prepared):
        listener(Notice(level="warning", message=warning))
    return plan


def _said_by(listeners: Sequence[Listener]) -> OnNotice:
    """Tells the listeners what happens before the run has a directory to log in."""
    return lambda message: Broadcast(listeners)(Notice(level="info", message=message))


@contextmanager
def _open_session(prepared: Preparation, memory: MemoryPlan | None) -> Iterator[TrainSession]:
    config = prepared.config
    if memory is not None and memory.returns_memory:
        prepared.engine.spare_memory()
    session = prepared.engine.open_training(
        prepared.source.path,
        model_config=config.model,
        training=config.training,
        lora=config.lora,
        init=seeded_init(config.training.seed),
    )
    with closing(session):
        yield session


def _write_inputs(paths: RunPaths, prepared: Preparation) -> None:
    """config.yml and run.json, which comes last: with it, the directory is a run."""
    paths.checkpoints.mkdir()
    write_atomically(paths.config, dump_config(prepared.config))
    write_atomically(paths.run_info, to_text(run_record(prepared)))


@dataclass(frozen=True, slots=True)
class _Run:
    """One run that is prepared, with its directory and its session open."""

    paths: RunPaths
    prepared: Preparation
    session: TrainSession
    listeners: Sequence[Listener]
    memory: MemoryPlan | None

    def go(self, start: StartingPoint | None, *, said: Sequence[Event], notices: Sequence[Notice]) -> TrainingResult:
        """Train from `start` (None: from the first step) to the end, and leave the results.

        What the listeners were `said` already is only logged.
        """
        with closing(MetricsLog(self.paths.metrics)) as metrics, closing(TextLog(self.paths.log)) as log:
            emit = Broadcast([metrics, log, *self.listeners])
            for notice in said:
                Broadcast([metrics, log])(notice)
            for notice in notices:
                emit(notice)
            if start is not None:
                self.session.load_state(start.checkpoint)
            emit(self._started(start))
            outcome = self._loop(start, emit)
            return self._end(outcome, emit)

    def _loop(self, start: StartingPoint | None, emit: Listener) -> Outcome:
        with stop_on_signals(StopRequest()) as stop:
            return Trainer(
                self.session,
                self.prepared.plan,
                self.prepared.batches,
                validation=validation_of(self.prepared),
                checkpoints=Checkpoints(self.paths, self.prepared.config.output.keep_checkpoints),
                emit=emit,
                stop=stop,
                state=None if start is None else start.state,
            ).run()

    def _end(self, outcome: Outcome, emit: Listener) -> TrainingResult:
        state = outcome.state
        if outcome.signal is not None:
            emit(RunFinished(step=state.step, reason=outcome.reason, seconds=state.elapsed_seconds))
            raise StoppedBySignal(
                f"Stopped by {outcome.reason} after step {state.step}, which is saved. "
                f"Go on with: ft train --resume {self.paths.root}",
                outcome.signal,
            )
        finisher = Finisher(self.paths, self.prepared, self.session.parameters, self.memory, emit)
        report = finisher.finish(outcome)
        emit(RunFinished(step=state.step, reason=outcome.reason, seconds=state.elapsed_seconds, summary=dict(report)))
        finisher.write_page(report)
        return _result(self.paths, report, finisher.place)

    def _started(self, start: StartingPoint | None) -> RunStarted:
        prepared, parameters = self.prepared, self.session.parameters
        return RunStarted(
            run_dir=str(self.paths.root),
            engine=prepared.engine.name,
            method=prepared.config.training.method,
            model=prepared.source.name,
            total_steps=prepared.plan.total_steps,
            steps_per_epoch=prepared.plan.steps_per_epoch,
            trainable_parameters=parameters.trainable,
            total_parameters=parameters.total,
            train_rows=len(prepared.data.train),
            validation_rows=len(prepared.evaluated),
            resumed_from=None if start is None else start.state.step,
        )


def _result(paths: RunPaths, report: Mapping[str, Any], place: Path) -> TrainingResult:
    return TrainingResult(
        run_dir=paths.root,
        final_loss=_number(report["final_loss"]),
        perplexity=_number(report["perplexity"]),
        training_time=report["training_time_seconds"],
        peak_memory_gb=report["peak_memory_gb"],
        metrics=report,
        adapter=place if place == paths.adapter else None,
        model=place if place == paths.model else None,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _notices(prepared: Preparation, session: TrainSession) -> list[Notice]:
    """What was inferred, what was left out, and what is unusual."""
    advice = prepared.advice(session.parameters.total)
    inferred = (
        prepared.engine_notice(),
        *session.notices,
        *prepared.data.notices,
        *prepared.plan.notices,
        *starting_notices(prepared.config),
    )
    return [
        *(Notice(level="info", message=message) for message in inferred),
        *(Notice(level="warning", message=message) for message in advice),
    ]


def _default_directory(config: RunConfig) -> str:
    """outputs/<model>-<data>-<time>, with a number where that is there: a second has room for two runs."""
    given = config.data.train_file
    first = given if isinstance(given, str) else given[0]
    data = Path(first if isinstance(first, str) else first.path)
    names = (Path(config.model.name).name, data.name.split(".")[0], f"{datetime.now():%Y%m%d-%H%M%S}")
    directory = f"outputs/{'-'.join(re.sub(r'[^A-Za-z0-9_.]+', '_', name) for name in names)}"
    others = (f"{directory}-{number}" for number in itertools.count(2))
    return next(path for path in itertools.chain([directory], others) if not Path(path).exists())
