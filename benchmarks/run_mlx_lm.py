"""One run of mlx-lm's LoRA trainer. Prints one JSON line.

On Linux it gets the same OpenBLAS as this project: the wheel's own BLAS is about 30 times slower.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetune.engines.mlx  # noqa: F401 - loads OpenBLAS before MLX
from benchmarks.measuring import StepClock

LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--masked", action="store_true")
    return parser.parse_args()


def in_file_order(dataset: Any, batch_size: int, max_seq_length: int, **_: Any) -> Iterator[Any]:
    """mlx-lm's own batches, padding included, of neighbouring rows in the order of the file."""
    from mlx_lm.tuner.trainer import iterate_batches

    for start in range(0, len(dataset), batch_size):
        rows = [dataset[number] for number in range(start, start + batch_size)]
        yield from iterate_batches(rows, batch_size, max_seq_length)


def main() -> None:
    """Train on every row of the file once, in its order."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, create_dataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from benchmarks.workload import read_rows

    arguments, clock = parse(), StepClock()

    class Listener(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            clock.step(train_info["train_loss"])

    mx.random.seed(0)
    model, tokenizer = load(arguments.model)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": LINEAR})
    rows = read_rows(Path(arguments.data))
    config = SimpleNamespace(mask_prompt=arguments.masked)
    data = CacheDataset(create_dataset(rows, tokenizer, config))
    accumulate = 4 // arguments.batch
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArgs(
            batch_size=arguments.batch,
            grad_accumulation_steps=accumulate,
            iters=len(rows) // arguments.batch,
            steps_per_report=accumulate,
            steps_per_save=10**6,
            max_seq_length=1024,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        train(
            model,
            optim.AdamW(1e-4, weight_decay=0.0, bias_correction=True),  # as the other sides compute it
            data,
            None,
            options,
            iterate_batches=in_file_order,
            training_callback=Listener(),
        )
    clock.report()


if __name__ == "__main__":
    main()
