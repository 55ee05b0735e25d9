"""What the MLX engine computes itself on the CPU, against NumPy in float64 and MLX's own attention."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tests.support.batches import batch_of, random_rows
from tests.support.engines import BASE
from tests.support.tiny_models import VOCABULARY

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, TrainingConfig
from finetune.engines.mlx import workers
from finetune.engines.mlx.attention import attend
from finetune.engines.mlx.documents import Documents
from finetune.engines.mlx.engine import MLXEngine
from finetune.engines.mlx.exponential import exp

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other devices use MLX's own functions")

UNITS = 1.5 * 2.0**-23  # relative: the last place of float32, and the rounding of the remainder

CHECK_EXP = """
import numpy as np, mlx.core as mx
from finetune.engines.mlx.exponential import exp
x = np.linspace(-80, 80, 20_001).astype(np.float32)
error = np.abs(np.array(exp(mx.array(x))) / np.exp(x.astype(np.float64)) - 1).max()
print(error < 1.5 * 2.0**-23)
"""


def test_exp_is_exact_to_the_last_places_of_float32() -> None:
    x = np.linspace(-87.0, 88.0, 1_000_003).astype(np.float32)
    np.testing.assert_allclose(np.array(exp(mx.array(x))), np.exp(x.astype(np.float64)), rtol=UNITS)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(-np.inf, 0.0), (-1e30, 0.0), (-104.0, 0.0), (0.0, 1.0), (89.0, np.inf), (1e30, np.inf), (np.inf, np.inf)],
)
def test_exp_saturates_like_numpy(x: float, expected: float) -> None:
    found = np.array(exp(mx.full((4096,), x)))
    assert (found == expected).all()


def test_exp_hands_on_what_is_not_a_number() -> None:
    assert np.isnan(np.array(exp(mx.full((4096,), float("nan"))))).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_exp_of_other_types_is_that_of_mlx(dtype: mx.Dtype) -> None:
    x = mx.linspace(-5, 5, 4096).astype(dtype)
    assert mx.array_equal(exp(x), mx.exp(x)).item()


def test_exp_needs_no_compiler(tmp_path: Path) -> None:
    """A PATH without g++ and a temporary directory without compiled loops."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to("/bin/sh")
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK_EXP], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"
    assert not list(tmp_path.rglob("*.so"))


def by_mlx(q: mx.array, k: mx.array, v: mx.array, scale: float, documents: Documents) -> mx.array:
    parts = []
    for start, end in documents.spans():
        distance = mx.arange(end - start)[:, None] - mx.arange(end - start)
        seen = (distance >= 0) & (distance < (documents.window or 10**6))
        arrays = (array[:, :, start:end] for array in (q, k, v))
        parts.append(mx.fast.scaled_dot_product_attention(*arrays, scale=scale, mask=seen))
    return mx.concatenate(parts, axis=2)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize(
    "documents",
    [
        Documents((1,)),
        Documents((128, 129, 127)),
        Documents((5, 300, 1, 200)),
        Documents((700,)),  # long enough for its probabilities to be computed again
        Documents((5, 300, 20), window=7),
        Documents((600,), window=200),
    ],
    ids=str,
)
def test_attention_and_its_gradients_are_those_of_mlx(heads: tuple[int, int], documents: Documents) -> None:
    length = sum(documents.lengths)
    shapes = [(2, heads[0], length, 8), (2, heads[1], length, 8), (2, heads[1], length, 8)]
    arrays = [mx.random.normal(shape, key=mx.random.key(seed)) for seed, shape in enumerate(shapes)]
    cotangent = mx.random.normal(shapes[0], key=mx.random.key(9))
    found = mx.vjp(lambda *qkv: attend(*qkv, scale=0.4, documents=documents), arrays, [cotangent])
    expected = mx.vjp(lambda *qkv: by_mlx(*qkv, 0.4, documents), arrays, [cotangent])
    for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        largest = max(1.0, float(mx.abs(theirs).max()))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=3e-6 * largest)  # sums of 700 float32 products


def test_large_scores_do_not_overflow() -> None:
    q = mx.full((1, 1, 300, 8), 100.0)
    found = attend(q, q, mx.random.normal(q.shape), scale=1.0, documents=Documents((300,)))
    assert mx.isfinite(found).all().item()


@pytest.mark.parametrize("count", [2, 3])
def test_workers_give_the_step_of_a_single_thread(llama: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    rows = random_rows(7, vocabulary=VOCABULARY, lengths=(3, 40))
    batches = [batch_of(rows[:4], prompt=2), batch_of(rows[4:], prompt=2)]

    def losses(workers_count: int) -> list[float]:
        monkeypatch.setattr(workers, "load_openblas", lambda: FakeChoice(workers_count))
        training = TrainingConfig(batch_size=8)
        session = MLXEngine().open_training(
            llama, model_config=BASE, training=training, lora=LoraConfig(rank=4), init=seeded_init(0)
        )
        results = [session.step(batches, learning_rate=0.02).result().loss for _ in range(5)]
        session.close()
        return results

    alone = losses(1)
    assert losses(count) == pytest.approx(alone, rel=1e-5)  # another order of additions
    assert alone[-1] < alone[0]


class FakeChoice:
    """A BLAS library with a number of threads."""

    def __init__(self, threads: int) -> None:
        self.library = self
        self._threads = threads

    def openblas_get_num_threads(self) -> int:
        return self._threads

    def openblas_set_num_threads(self, threads: int) -> None:
        self._threads = threads
