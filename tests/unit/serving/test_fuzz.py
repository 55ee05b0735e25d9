"""Requests made from the server's own description (schemathesis): whatever comes, the answer is one it describes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from tests.support.serving import Served, served

# More are tried by hand: FT_FUZZ_EXAMPLES=1000 pytest tests/unit/serving/test_fuzz.py
EXAMPLES = int(os.environ.get("FT_FUZZ_EXAMPLES", "12"))
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root: Path = tmp_path_factory.mktemp("adapters")
    (root / "mine").mkdir()
    (root / "mine" / "adapter_config.json").write_text("{}")
    with served(adapters=["tuned"], adapter_root=root, max_tokens=64) as running:
        yield running


@pytest.fixture(scope="module")
def description(server: Served) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_tried(server: Served) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == set(OPERATIONS)


# `positive_data_acceptance` is left out: some rules are about two fields together, which the description cannot say.
TRIED = [(method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS]
TRIED += [(method, path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if method == "POST"]


def tried(examples: int) -> settings:
    return settings(
        max_examples=examples,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize(("method", "path", "mode"), TRIED)
def test_no_request_breaks_the_server(description: Any, method: str, path: str, mode: GenerationMode) -> None:
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    @tried(EXAMPLES)
    def try_it(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    try_it()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_request_to_a_model_that_exists_breaks_it(description: Any, path: str) -> None:
    """Drawn names are hardly ever served, and a name that is not ends a request early."""

    @given(case=description[path]["POST"].as_strategy())
    @tried(2 * EXAMPLES)
    def try_it(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body["model"] = "base"
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    try_it()
