"""What the MLX engine imports: mlx-lm's models without its tokenizers, and the whole package for who asks for it."""

import subprocess
import sys

import pytest

TRAIN = """
import finetune
finetune.train({
    "model": {"name": "demo", "backend": "mlx"}, "data": {"train_file": "rows.jsonl"},
    "training": {"max_steps": 1}, "output": {"output_dir": "run"},
})
"""
GENERATE = "import finetune; finetune.generate('hi', model='demo', backend='mlx')"
MODELS_THEN_WHOLE = """
from finetune.engines.mlx import compat
from finetune.models.source import DEMO_DIRECTORY as MODEL
compat.build_model(compat.read_config(MODEL))
light = "transformers" not in sys.modules
from mlx_lm import load
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load as same
model, tokenizer = load(str(MODEL))
print(light, load is same, isinstance(tokenizer, TokenizerWrapper))
"""
WHOLE_THEN_MODELS = """
import mlx_lm
from finetune.engines.mlx import light
import mlx_lm.utils
print(light.utils() is mlx_lm.utils)
"""


def printed(code, directory) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("code", [TRAIN, GENERATE], ids=["training", "generation"])
def test_neither_transformers_nor_pytorch_is_imported(code, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One, two,", "completion": " three."}\n' * 3)

    loaded = printed(f"{code}\nprint(); print(*{{name.split('.')[0] for name in sys.modules}})", tmp_path)

    assert "mlx_lm" in loaded.splitlines()[-1].split()
    assert not {"torch", "transformers"} & set(loaded.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "expected"), [(MODELS_THEN_WHOLE, "True True True"), (WHOLE_THEN_MODELS, "True")], ids=["after", "before"]
)
def test_mlx_lm_is_whole_for_who_asks_for_it(code, expected, tmp_path):
    assert printed(code, tmp_path) == expected
