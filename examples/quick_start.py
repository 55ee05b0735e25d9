"""Tune the carried demo model on the sample data set, then ask it something. Takes about a minute on two cores.

Run it from the repository: `python examples/quick_start.py`
"""

from pathlib import Path

import finetune

HERE = Path(__file__).resolve().parent

result = finetune.train(
    {
        "model": {"name": "demo"},
        "data": {"train_file": str(HERE / "sample_dataset.json")},
        "training": {"epochs": 3, "learning_rate": 1e-3},
        "lora": {"rank": 8},
    }
)
print(f"{result.run_dir}: loss {result.final_loss:.3f}, perplexity {result.perplexity:.2f}")

evaluation = finetune.evaluate(run=result.run_dir)
print(f"base loss {evaluation.base.loss:.3f}, tuned loss {evaluation.tuned.loss:.3f}")

answer = finetune.generate(model="demo", adapter=result.adapter, prompt="What can you do for me?", max_tokens=40)
print(answer.text)
