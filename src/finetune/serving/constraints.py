"""Answers that must be JSON, or match a JSON schema: a grammar says which tokens may come next (llguidance)."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from typing import Any

import numpy as np

from finetune.core.types import BoolArray, TokenConstraint
from finetune.generation.requests import Prompt
from finetune.serving.errors import ApiError, invalid
from finetune.serving.schemas import JsonObjectFormat, JsonSchemaFormat, ResponseFormat
from finetune.serving.vocabulary import Vocabulary

LARGEST_SCHEMA = 64_000  # characters
COMPILE_SECONDS = 5.0
ANY_OBJECT = {"type": "object"}
# Without a bound, a model that knows little of JSON fills its answer with spaces.
WHITE_SPACE = r"[ \n\r\t]{1,20}"

NewConstraint = Callable[[Prompt], TokenConstraint]


class GrammarConstraint:
    """Implements `TokenConstraint` with one of llguidance's matchers."""

    def __init__(self, matcher: Any, stop_tokens: frozenset[int], vocabulary: int) -> None:
        self._matcher = matcher
        self._stops = np.array(sorted(stop_tokens), np.int64)
        self._vocabulary = vocabulary

    def allowed(self) -> BoolArray:
        """See TokenConstraint. Stop tokens end the answer where the grammar is complete, and nowhere else."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask: BoolArray = np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(np.bool_)
        mask[self._stops] = self._matcher.is_accepting()
        if not mask.any():  # nothing fits any more, which a limit of the matcher can bring about
            mask[self._stops] = True
        return mask

    def advance(self, token: int) -> None:
        """See TokenConstraint."""
        self._matcher.consume_token(token)


class Grammars:
    """Compiles one grammar at a time, within bounds of size and time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._waiting = threading.BoundedSemaphore(8)

    def constraint(self, format: ResponseFormat | None) -> NewConstraint | None:
        """What makes constraints for a format; None for free text. Raises ApiError (400) for a schema that is none."""
        if isinstance(format, JsonObjectFormat):
            return self._compiled(ANY_OBJECT)
        if isinstance(format, JsonSchemaFormat):
            return self._compiled(format.json_schema.json_schema)
        return None

    def _compiled(self, schema: dict[str, Any]) -> NewConstraint:
        text = json.dumps(schema)
        if len(text) > LARGEST_SCHEMA:
            raise _refused(f"it has {len(text):,} characters, and at most {LARGEST_SCHEMA:,} are taken")
        if not self._waiting.acquire(blocking=False):
            raise ApiError(429, "Too many schemas are being compiled.", kind="rate_limit_error", code="queue_full")
        compiling = self._compiling.submit(self._matcher, text)
        compiling.add_done_callback(lambda _done: self._waiting.release())
        try:
            first = compiling.result(COMPILE_SECONDS)
        except OutOfTime:
            raise _refused(f"it takes longer than {COMPILE_SECONDS:g} s to compile") from None
        except ValueError as error:
            raise _refused(str(error)) from None
        if first.is_error():
            raise _refused(first.get_error())
        size = self._vocabulary.table().vocab_size
        return lambda prompt: GrammarConstraint(first.deep_copy(), prompt.stop_tokens, size)

    def _matcher(self, schema: str) -> Any:
        import llguidance

        limits = llguidance.LLParserLimits(verbose_errors=False)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})
        return llguidance.LLMatcher(self._vocabulary.table(), grammar, log_level=0, limits=limits)


def _refused(reason: str) -> ApiError:
    first_line = reason.strip().splitlines()[0] if reason.strip() else "unknown reason"
    return invalid(f"The JSON schema cannot be used: {first_line[:300]}.", "response_format", "invalid_schema")
