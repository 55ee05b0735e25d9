"""`ft export`, once in a process of its own, and what it wrote."""

from pathlib import Path

from safetensors.numpy import load_file
from tests.support.ft import ft
from tests.support.in_process import ft_here
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model


def test_an_adapter_is_merged_and_the_result_answers_like_it(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    adapter = write_tiny_adapter(tmp_path / "adapter", base=str(model))
    exported = ft("export", adapter, "--format", "merged", "--output", tmp_path / "out", "--json")
    assert exported.code == 0
    assert exported.json["comparison"]["largest_difference"] < 1e-4
    asked = ["--prompt", "Hello", "--max-tokens", 8, "--json"]
    assert (
        ft_here("generate", "--model", tmp_path / "out", *asked).json["text"]
        == (ft_here("generate", "--adapter", adapter, *asked).json["text"])
    )


def test_an_adapter_goes_to_mlx_lm_and_back_without_its_base(tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", base=str(tmp_path / "elsewhere"))
    for source, format in ((adapter, "mlx"), (tmp_path / "mlx", "peft")):
        ran = ft_here("export", source, "--format", format, "--output", tmp_path / format)
        assert ran.code == 0
        assert "elsewhere is not on this machine" in ran.err
    weights = "adapter_model.safetensors"
    before, after = load_file(adapter / weights), load_file(tmp_path / "peft" / weights)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran = ft_here("export", tmp_path, "--format", "peft", "--output", tmp_path)
    assert ran.code in {1, 2}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
