"""Tune the carried demo model on the sample data set, then ask it something. Takes less than a minute.

Run it from the repository: `python examples/quick_start.py`
"""

from pathlib import Path

import finetune

HERE = Path(__file__).resolve().parent

result = finetune.train(
    {
        "model": {"name": "demo"},
        "data": {"train_file": str(HERE / "sample_dataset.json")},
        "training": {"epochs": 20, "learning_rate": 4e-3},
        "lora": {"rank": 8},
    }
)
print(f"{result.run_dir}: loss {result.final_loss:.3f}, perplexity {result.perplexity:.2f}")

evaluation = finetune.evaluate(result.run_dir, generate=2)
print(f"base loss {evaluation.base.loss:.3f}, tuned loss {evaluation.tuned.loss:.3f}")

answer = finetune.generate(
    "Wake me at seven tomorrow.", model="demo", adapter=result.adapter, system="Answer with one tool call as JSON."
)
print(answer.text)
