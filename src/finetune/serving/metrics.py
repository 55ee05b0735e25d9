"""What an operator watches, in Prometheus' text format. Labels are served names and routes, never clients' words."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry for each server, so that several can live in one process."""

    def __init__(self, *, active: Callable[[], int], waiting: Callable[[], int], alive: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("finetune_requests", "Requests answered.", "route", "status")
        self._prompt = self._counter("finetune_prompt_tokens", "Tokens of prompts.", "model")
        self._generated = self._counter("finetune_generated_tokens", "Tokens of answers.", "model")
        self._first = self._histogram("finetune_time_to_first_token_seconds", "From arrival to the first token.")
        self._whole = self._histogram("finetune_request_seconds", "From arrival to the end of the answer.")
        for name, text, value in (
            ("finetune_active_answers", "Answers that decode now.", active),
            ("finetune_waiting_answers", "Answers that wait for a place.", waiting),
            ("finetune_engine_up", "1 while the engine decodes.", lambda: int(alive())),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("model",), buckets=_SECONDS, registry=self._registry)

    def answered(self, route: str, status: int) -> None:
        """A response went out; `route` is the pattern, not the path."""
        self._requests.labels(route, str(status)).inc()

    def completed(
        self, model: str, *, prompt_tokens: int, generated: int, first_token: float | None, seconds: float
    ) -> None:
        """A completion ended, whole or not. `seconds` and `first_token` count from its arrival."""
        self._prompt.labels(model).inc(prompt_tokens)
        self._generated.labels(model).inc(generated)
        self._whole.labels(model).observe(seconds)
        if first_token is not None:
            self._first.labels(model).observe(first_token)

    def text(self) -> bytes:
        """All of it as `/metrics` shows it."""
        return generate_latest(self._registry)
