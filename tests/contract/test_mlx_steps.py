"""How MLX goes through a step on the CPU: compiled loops, order of evaluation, memory, and the end of the process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from finetune.engines.mlx.attention import attend
from finetune.engines.mlx.documents import Documents
from finetune.engines.mlx.swiglu import swiglu
from finetune.engines.mlx.untraced import untraced

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other devices use MLX's own functions")

Array = npt.NDArray[np.float64]

PEAKS = """
import json, sys
from pathlib import Path
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_training
from finetune.engines.mlx.engine import MLXEngine

model, options = Path(sys.argv[1]), json.loads(sys.argv[2])
batches = [batch_of(random_rows(2, vocabulary=272, lengths=(200, 201)))]
session = open_training(MLXEngine(), model, **options)
before = session.peak_memory_bytes()
session.step(batches, learning_rate=1e-3).result()
print(session.peak_memory_bytes() - before)
session.close()
"""


def by_numpy(gate: Array, up: Array, cotangent: Array) -> tuple[Array, Array, Array]:
    sigmoid = 1.0 / (1.0 + np.exp(-gate))
    d_gate = cotangent * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return gate * up * sigmoid, d_gate, cotangent * gate * sigmoid


def never(*arrays: Any) -> Any:
    raise AssertionError("mlx-lm's function was used")


def test_swiglu_and_its_gradients_are_exact_to_the_last_places() -> None:
    drawn = np.random.default_rng(0).normal(size=(3, 7, 11, 97)).astype(np.float32)
    gate, up, cotangent = drawn[0] * 20.0, drawn[1], drawn[2]
    arrays = [mx.array(gate), mx.array(up)]
    outputs, gradients = mx.vjp(lambda *both: swiglu(*both, otherwise=never), arrays, [mx.array(cotangent)])
    expected = by_numpy(*(array.astype(np.float64) for array in (gate, up, cotangent)))
    for found, wanted in zip([*outputs, *gradients], expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("gate", "expected"), [(-1e4, 0.0), (-100.0, 0.0), (100.0, 200.0), (1e30, 2e30)])
def test_swiglu_saturates(gate: float, expected: float) -> None:
    found = swiglu(mx.full((4096,), gate), mx.full((4096,), 2.0), otherwise=never)
    assert np.array(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("arrays", [(mx.ones(8), mx.ones(8)), (mx.ones(4096, mx.bfloat16),) * 2], ids=["few", "bf16"])
def test_swiglu_of_what_does_not_pay_is_mlx_lms(arrays: tuple[mx.array, mx.array]) -> None:
    assert swiglu(*arrays, otherwise=lambda gate, up: "mlx-lm") == "mlx-lm"


def has_compiled_loops(function: Callable[..., Any], arrays: list[mx.array], path: Path) -> bool:
    """Whether the graph of the value and gradients of `function` has any."""
    found = mx.vjp(function, arrays, [mx.ones_like(arrays[0])])
    mx.export_to_dot(str(path), [*found[0], *found[1]])
    return "Compiled" in path.read_text()


def test_loops_stay_compiled_while_mlx_differentiates(tmp_path: Path) -> None:
    def attention(q: mx.array, k: mx.array, v: mx.array) -> Any:
        return attend(q, k, v, scale=0.25, documents=Documents((300,)))

    arrays = [mx.random.normal((1, 4, 300, 16), key=mx.random.key(number)) for number in range(3)]
    assert has_compiled_loops(attention, arrays, tmp_path / "attention.dot")
    assert has_compiled_loops(lambda x, y: swiglu(x, y, otherwise=never), arrays[:2], tmp_path / "swiglu.dot")


def test_errors_of_untraced_functions_reach_the_caller() -> None:
    def wrong(x: mx.array) -> mx.array:
        raise ValueError("no graph")

    with pytest.raises(ValueError, match="no graph"):
        untraced(wrong)(mx.ones(3))
    assert untraced(lambda x: x + 1.0)(mx.ones(1)).item() == 2.0  # and the thread goes on


def peak_of_a_step(model: Path, **options: Any) -> int:
    """In a process of its own: MLX reads the order of evaluation once."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(model), json.dumps(options)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""  # also what MLX says where the process ends in the wrong moment
    return int(done.stdout)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_recomputed_activations_are_not_kept_for_gradients(wide: Path, method: str) -> None:
    kept = peak_of_a_step(wide, method=method)
    assert peak_of_a_step(wide, method=method, gradient_checkpointing=True) < 0.4 * kept


def test_an_update_holds_intermediate_arrays_of_one_weight_at_a_time(wide: Path) -> None:
    """Beside the weights and both moments: their gradients, and the activations of a layer."""
    weights = (wide / "model.safetensors").stat().st_size
    assert peak_of_a_step(wide, method="full", gradient_checkpointing=True) < 2.5 * weights


@pytest.mark.parametrize(("given", "expected"), [(None, "1000000"), ("7", "7")])
def test_graphs_advance_together_unless_the_user_says_otherwise(given: str | None, expected: str) -> None:
    code = "import os; from finetune.engines.mlx.device import use_device; use_device('cpu'); "
    environment = {name: value for name, value in os.environ.items() if name != "MLX_BFS_MAX_WIDTH"}
    environment.update({} if given is None else {"MLX_BFS_MAX_WIDTH": given})
    done = subprocess.run(
        [sys.executable, "-c", code + "print(os.environ['MLX_BFS_MAX_WIDTH'])"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
