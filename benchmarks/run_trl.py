"""One run of TRL's SFTTrainer with PEFT's LoRA. Prints one JSON line."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import StepClock
from benchmarks.workload import read_rows

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--masked", action="store_true")
    return parser.parse_args()


def dataset(path: str, *, masked: bool) -> Any:
    """Conversations, or prompt and completion, of which TRL trains on the completion only."""
    from datasets import Dataset

    rows = read_rows(Path(path))
    if masked:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    return Dataset.from_list(rows)


def main() -> None:
    """Train on every row of the file once, in its order."""
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    arguments, clock = parse(), StepClock()

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.step(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=arguments.batch,
            gradient_accumulation_steps=4 // arguments.batch,
            max_length=1024,
            bf16=arguments.dtype == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": arguments.dtype},
        )
        SFTTrainer(
            model=arguments.model,
            args=config,
            train_dataset=dataset(arguments.data, masked=arguments.masked),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM"),
            callbacks=[Listener()],
        ).train()
    clock.report()


if __name__ == "__main__":
    main()
