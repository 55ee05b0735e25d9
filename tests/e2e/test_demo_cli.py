"""`ft demo` as a person runs it: the figures that the README promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.in_process import ft_here


def ft(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["mlx", "pytorch"])
def test_the_demo_takes_exact_match_from_nearly_none_to_nearly_all(tmp_path, backend):
    done = ft("demo", "--backend", backend, "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "outputs/demo/report.json").read_text())
    assert report["engine"] == backend
    assert report["exact_match"]["base"] <= 0.10
    assert report["exact_match"]["tuned"] >= 0.90
    assert report["seconds"] >= report["training_time_seconds"]
    assert (tmp_path / "outputs/demo/report.html").is_file()
    assert "What to do next" in done.stderr
    if backend == "mlx":
        answers_the_same_in_llama_cpp(tmp_path, report["exact_match"]["tuned"])


def answers_the_same_in_llama_cpp(root, exact_match):
    """Export the run of `ft demo`, and let llama.cpp answer all test rows, prompts and tokens its own."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="llama.cpp is needed to run what was written")
    from finetune.export.llamacpp import serve
    from finetune.workflows.demo import demo_rows

    rows = demo_rows("test", 10**6)
    # Float weights give the same answers but for ties; four bits may lose one or two of the hundred.
    for quantize, allowed in (("f16", 0.01), ("q8_0", 0.01), ("q4_k_m", 0.03)):
        output = root / f"{quantize}.gguf"
        ran = ft_here("export", root / "outputs/demo", "--format", "gguf", "-q", quantize, "--output", output)
        assert ran.code == 0, ran.err
        with serve(output, threads=1) as server:
            prompts = [server.render([{"role": "user", "content": row.request}]) for row in rows]
            answers = [server.complete(server.tokenize(prompt, add_special=True), max_tokens=96) for prompt in prompts]
        right = sum(answer.strip() == row.call for answer, row in zip(answers, rows, strict=True))
        assert right / len(rows) == pytest.approx(exact_match, abs=allowed)


def test_the_demo_refuses_the_directory_of_another_run(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "run.json").write_text("{}")
    (mine / "config.yml").write_text("model:\n  name: other\n")

    ran = ft_here("demo", "--output", mine, "--json")

    assert ran.code == 2
    assert "holds another run" in ran.json["error"]["message"]
    assert "The base model" not in ran.err  # it is said at once
    assert (mine / "config.yml").is_file()
