"""Which models a server has, and that their prompts are those of training."""

import json
from pathlib import Path

import pytest
from tests.support.tiny_model import CHATML, write_tiny_adapter, write_tiny_model

from finetune.core.errors import FinetuneError, UsageError
from finetune.workflows.serving_models import ServedModels, models_to_serve, open_below, public_name
from finetune.workflows.subjects import find_subject

WEIGHTS = "model.safetensors"
OTHER = CHATML.replace("\n", " ")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def run_of(model: Path, place: Path, *, template: str = "tokenizer", sha256: str | None = None) -> Path:
    """A run as `ft train` leaves it, as far as serving looks at it."""
    from finetune.core.files import sha256_of
    from finetune.data.templates import choose_template
    from finetune.data.tokenizer import TextTokenizer

    write_tiny_adapter(place / "adapter", base=str(model))
    tokenizer = TextTokenizer.open(model)
    config = f"model: {{name: {model}}}\ndata: {{train_file: rows.jsonl, template: {template}}}\n"
    (place / "config.yml").write_text(config)
    record = {
        "format": 1,
        "model": {"name": str(model), "path": str(model), "files": {WEIGHTS: sha256_of(model / WEIGHTS)}},
        "tokenizer": {"sha256": tokenizer.fingerprint},
        "template": {"name": template, "sha256": sha256 or choose_template(template, tokenizer).sha256},
    }
    (place / "run.json").write_text(json.dumps(record))
    return place


def models(*, said: list[str] | None = None, **arguments: object) -> ServedModels:
    notices: list[str] = [] if said is None else said
    wanted = {"name": None, "adapters": {}, "template": None, "on_notice": notices.append, **arguments}
    subject = find_subject(model=str(wanted.pop("model")))
    return models_to_serve(subject, **wanted)


def test_a_run_is_served_under_its_own_name_beside_its_base(model: Path, tmp_path: Path) -> None:
    served = models(model=run_of(model, tmp_path / "mine"))
    assert served.catalogue.names == ("tiny", "mine")
    assert served.catalogue.find("mine").parent == "tiny"
    assert served.catalogue.find("mine").root == "mine"
    assert served.adapters == {"mine": tmp_path / "mine" / "adapter"}
    assert models(model=tmp_path / "mine", name="tuned").catalogue.names == ("tiny", "tuned")


def test_further_adapters_have_the_names_they_are_given(model: Path, tmp_path: Path) -> None:
    other = write_tiny_adapter(tmp_path / "other", base=str(model))
    served = models(model=model, adapters={"a": other, "b": run_of(model, tmp_path / "run")})
    assert served.catalogue.names == ("tiny", "a", "b")
    with pytest.raises(UsageError, match="Two models are called 'tiny'"):
        models(model=model, adapters={"tiny": other})


def test_a_template_that_changed_since_training_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    run = run_of(model, tmp_path / "run", template=str(file))
    assert models(model=run).catalogue.find("run").prompter.template is not None
    file.write_text(OTHER)
    with pytest.raises(UsageError, match="not the one that it was tuned with"):
        models(model=run)


def test_a_tokenizer_that_changed_since_training_is_refused(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "run")
    document = json.loads((model / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][-1], "id": 261, "content": "<new>"})
    (model / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="the tokenizer is another one"):
        models(model=run)


def test_an_adapter_has_the_template_that_lies_beside_it(model: Path, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "a", base=str(model))
    (adapter / "chat_template.jinja").write_text(OTHER)
    served = models(model=model, adapters={"a": adapter})
    template = served.catalogue.find("a").prompter.template
    assert template is not None
    assert template.source == OTHER
    base = served.catalogue.base.prompter.template
    assert base is not None
    assert base.source == CHATML


def test_another_base_than_the_run_s_is_said_at_the_start_and_refused_later(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    run = run_of(model, root / "run")
    (tmp_path / "elsewhere").mkdir()
    twin = write_tiny_model(tmp_path / "elsewhere" / "tiny", seed=5)
    said: list[str] = []
    served = models(model=twin, adapters={"a": run}, said=said)
    assert "differs from that one" in said[-1]
    with pytest.raises(FinetuneError, match="differs from that one"):
        open_below(served.base, served.catalogue.base.prompter, run, root)


def test_a_run_loaded_later_must_have_training_s_template_too(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    run = run_of(model, root / "run")
    served = models(model=model)
    assert open_below(served.base, served.catalogue.base.prompter, run, root).directory == run / "adapter"
    (run / "adapter" / "chat_template.jinja").write_text(OTHER)
    with pytest.raises(UsageError, match="not the one that it was tuned with"):
        open_below(served.base, served.catalogue.base.prompter, run, root)


def test_links_out_of_the_directory_are_refused_whatever_they_are(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    adapter = write_tiny_adapter(root / "a", base=str(model))
    (tmp_path / "secret.jinja").write_text(CHATML)
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "secret.jinja")
    served = models(model=model)
    with pytest.raises(UsageError, match="link out"):
        open_below(served.base, served.catalogue.base.prompter, adapter, root)


def test_a_run_that_is_called_like_its_base_keeps_its_name(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "runs" / "tiny")
    assert models(model=run).catalogue.names == ("tiny-base", "tiny")
    assert models(model=run, name="mine").catalogue.names == ("tiny", "mine")


def test_clients_are_not_told_where_models_lie(model: Path) -> None:
    assert public_name(str(model)) == "tiny"
    assert public_name("org/model") == "org/model"
    assert public_name("demo") == "demo"
