"""What a finished run leaves: the weights of its best checkpoint, report.json and report.html."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import TrainingError
from finetune.core.events import Listener, Notice
from finetune.core.files import write_atomically
from finetune.core.paths import CHAT_TEMPLATE, RunPaths
from finetune.core.types import ParameterCount
from finetune.planning.memory import MemoryPlan
from finetune.tracking.metrics_log import read_events, to_text
from finetune.tracking.page import render_page
from finetune.tracking.report import RunFacts, make_report
from finetune.training.checkpoints import copy_result, damage
from finetune.training.state import TrainingState
from finetune.training.trainer import Outcome
from finetune.workflows.memory import memory_record
from finetune.workflows.preparation import Preparation
from finetune.workflows.record import read_record


@dataclass(frozen=True, slots=True)
class Finisher:
    """Writes the results of one run."""

    paths: RunPaths
    prepared: Preparation
    parameters: ParameterCount
    memory: MemoryPlan | None
    emit: Listener

    def finish(self, outcome: Outcome) -> Mapping[str, Any]:
        """Put the weights in their place and write the report; returns it.

        Raises TrainingError where the disk does not take them: everything is still in the checkpoints.
        """
        try:
            step, chosen = self._choose(outcome.state)
            copy_result(self.paths.checkpoint(step), self.place)
            self._leave_template()
            result = {"path": self.place.name, "step": step, "chosen": chosen}
            report = make_report(outcome.state, self._facts(outcome.state), reason=outcome.reason, result=result)
            write_atomically(self.paths.report, to_text(report))
        except OSError as error:
            raise TrainingError(
                f"Training is done, but the result could not be written: {error}. "
                f"The checkpoints are whole: make room, then `ft train --resume {self.paths.root}`."
            ) from error
        return report

    def write_page(self, report: Mapping[str, Any]) -> None:
        """Write report.html. A page that cannot be made costs a warning, never the run."""
        try:
            page = render_page(
                report,
                events=read_events(self.paths.metrics),
                config_text=self.paths.config.read_text(encoding="utf-8"),
                run_info=read_record(self.paths),
            )
            write_atomically(self.paths.report_page, page)
        except Exception as error:  # plotting libraries fail in many ways, and the run is done
            self.emit(Notice(level="warning", message=f"{self.paths.report_page} could not be made: {error}"))

    @property
    def place(self) -> Path:
        """Where the result goes."""
        return self.paths.model if self.prepared.config.training.method == "full" else self.paths.adapter

    def _leave_template(self) -> None:
        """Put the template beside the weights, unless the tokenizer has it: they are of use only with it."""
        template = self.prepared.data.template
        if template.source != self.prepared.tokenizer.chat_template:
            write_atomically(self.place / CHAT_TEMPLATE, template.source)

    def _choose(self, state: TrainingState) -> tuple[int, str]:
        """The best checkpoint where there was an evaluation, else the last; also where the best is damaged."""
        if state.best_step is None:
            return state.step, "last"
        problems = damage(self.paths.checkpoint(state.best_step))
        if not problems:
            return state.best_step, "best"
        message = f"The best checkpoint is damaged ({'; '.join(problems)}): the result is the last one."
        self.emit(Notice(level="warning", message=message))
        return state.step, "last"

    def _facts(self, state: TrainingState) -> RunFacts:
        prepared = self.prepared
        return RunFacts(
            engine=prepared.engine.name,
            method=prepared.config.training.method,
            model=prepared.source.name,
            run_dir=str(self.paths.root.resolve()),
            steps_per_epoch=prepared.plan.steps_per_epoch,
            parameters=self.parameters,
            rows=prepared.data.report.rows,
            validation_rows=len(prepared.data.validation),
            memory=memory_record(self.memory, prepared, state.peak_memory_bytes),
        )
