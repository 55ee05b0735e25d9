"""From files to rows with an account: every row that was read is in exactly one place."""

import json
from pathlib import Path

import pytest
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError, UsageError
from finetune.data.prepare import PreparedData, prepare_data, prepare_evaluation
from finetune.data.report import RowCounts

TOKENIZER = tiny_tokenizer()


def row(number: int, answer: str = "yes", **extra) -> dict:
    return {"prompt": f"Is {number} a number?", "completion": answer, **extra}


def write(folder: Path, rows, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(train_file, *, context=None, seed=1, samples=0, **options) -> PreparedData:
    config = DataConfig(train_file=train_file, **options)
    return prepare_data(config, tokenizer=TOKENIZER, context_length=context, seed=seed, samples=samples)


def adds_up(rows: RowCounts) -> bool:
    parts = rows.trained + rows.validation + rows.dropped + rows.duplicates + rows.undesirable
    return rows.read + rows.undesirable_duplicates == parts


def test_every_row_is_accounted_for(tmp_path):
    good = [row(n, label=True) for n in range(60)]
    bad_ones = [row(100 + n, label=False) for n in range(10)]
    file = write(tmp_path, [*good, good[0], *bad_ones, bad_ones[0], row(200, answer=""), row(201, answer="")])
    data = prepared(file, validation_split=0.1)
    rows = data.report.rows

    assert rows == RowCounts(
        read=74,
        trained=54,
        validation=6,
        dropped=2,
        truncated=0,
        duplicates=2,
        undesirable=11,
        undesirable_duplicates=1,
    )
    assert adds_up(rows)
    assert (len(data.train), len(data.validation)) == (54, 6)
    assert data.report.labels == {"desirable": 61, "undesirable": 11, "unlabelled": 0}
    assert "11 rows are labelled undesirable and left out" in "\n".join(data.notices)
    assert "data.jsonl:73: the row has no answer" in "\n".join(data.notices)


def test_undesirable_rows_are_trained_on_only_when_asked(tmp_path):
    file = write(tmp_path, [row(n, label=n % 2) for n in range(20)])

    assert prepared(file).report.rows.undesirable == 10
    assert prepared(file, include_undesirable=True).report.rows.undesirable == 0


@pytest.mark.parametrize(("bad", "fails"), [(6, True), (5, False), (0, False)])
def test_more_bad_rows_than_the_rate_fail_and_fewer_are_dropped(tmp_path, bad, fails):
    file = write(tmp_path, [row(n, answer="" if n < bad else "yes") for n in range(100)])

    if fails:
        with pytest.raises(
            DataError, match=r"6 of 100 rows cannot be used \(6\.0%\)[\s\S]*data\.jsonl:1: the row has no"
        ):
            prepared(file)
    else:
        assert prepared(file).report.rows.dropped == bad


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n", encoding="utf-8")

    with pytest.raises(DataError, match=r"rows\.csv: the file \(CSV\) has no rows"):
        prepared(str(path))


def test_a_single_bad_row_fails_where_it_is_the_only_one(tmp_path):
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used"):
        prepared(write(tmp_path, [row(1, answer="")]), max_error_rate=1.0)


def test_an_unknown_label_is_never_guessed_whatever_the_rate(tmp_path):
    file = write(tmp_path, [row(n, label=True) for n in range(99)] + [row(99, label="maybe")])

    with pytest.raises(DataError, match=r"data\.jsonl:100: the label 'maybe' is none of"):
        prepared(file, max_error_rate=0.5)


def test_nothing_left_is_an_error_with_its_reason(tmp_path):
    undesirable = write(tmp_path, [row(n, label=False) for n in range(9)], "bad.jsonl")
    long = write(tmp_path, [row(n) for n in range(9)])

    with pytest.raises(DataError, match="all 9 rows are labelled undesirable"):
        prepared(undesirable)
    with pytest.raises(DataError, match=r"within data\.max_length=16 tokens no row reaches its answer.*raise it to"):
        prepared(long, max_length=16)
    with pytest.raises(DataError, match=r"all are longer than data\.max_length=16.*on_long to truncate"):
        prepared(long, max_length=16, on_long="drop")


def test_long_rows_are_cut_dropped_or_refused_as_asked(tmp_path):
    file = write(tmp_path, [row(n) for n in range(19)] + [row(19, answer="x" * 500)])
    limit = {"template": "chatml", "max_length": 120}

    cut = prepared(file, **limit).report
    assert (cut.rows.truncated, cut.rows.dropped) == (1, 0)
    dropped = prepared(file, **limit, on_long="drop").report
    assert (dropped.rows.truncated, dropped.rows.dropped) == (0, 1)
    assert dropped.dropped == {"longer than max_length": 1}
    assert adds_up(dropped.rows)
    with pytest.raises(DataError, match=r"1 rows are longer than data\.max_length=120.*data\.jsonl:20 has 5"):
        prepared(file, **limit, on_long="error")


def test_rows_without_a_trained_token_are_dropped_and_counted(tmp_path):
    long_prompt = {"prompt": "x" * 500, "completion": "y"}
    report = prepared(
        write(tmp_path, [*[row(n) for n in range(9)], long_prompt]), template="plain", max_length=64
    ).report

    assert report.dropped == {"no trained token within max_length": 1}
    assert adds_up(report.rows)


def test_max_length_is_the_longest_row_within_the_context(tmp_path):
    file = write(tmp_path, [row(n) for n in range(10)] + [row(11, answer="x" * 300)])
    free, bounded = prepared(file, template="plain"), prepared(file, template="plain", context=100)

    assert free.max_length == max(map(len, (*free.train, *free.validation)))
    assert free.report.rows.truncated == 0
    assert bounded.max_length == 100
    assert bounded.report.rows.truncated == 1
    with pytest.raises(UsageError, match=r"data\.max_length=200 is more than the model's 100"):
        prepared(file, context=100, max_length=200)


def test_a_shorter_limit_is_recommended_where_few_rows_are_far_longer(tmp_path):
    data = prepared(write(tmp_path, [row(n) for n in range(200)] + [row(200, answer="x" * 900)]), template="plain")

    assert data.report.lengths.recommended == 32
    assert any("data.max_length=32 would save memory" in notice for notice in data.notices)


def test_weights_repeat_rows_or_take_a_part_of_them(tmp_path):
    twice = write(tmp_path, [row(n) for n in range(10)], "a.jsonl")
    half = write(tmp_path, [row(100 + n) for n in range(10)], "b.jsonl")
    files = ({"path": twice, "weight": 2.5}, {"path": half, "weight": 0.5})
    data = prepared(files, validation_split=0)
    rows = data.report.rows

    assert len(data.train) == 25 + 5
    assert {name: sum(r.origin.file == name for r in data.train) for name in ("a.jsonl", "b.jsonl")} == {
        "a.jsonl": 25,
        "b.jsonl": 5,
    }
    assert (rows.trained, rows.dropped) == (15, 5)
    assert adds_up(rows)


def test_a_validation_file_is_accounted_for_by_itself_and_leaks_are_reported(tmp_path):
    train = write(tmp_path, [row(n) for n in range(10)])
    held_out = write(tmp_path, [row(9, answer="no"), row(50), row(51)], "val.jsonl")
    data = prepared(train, validation_file=held_out)

    assert (len(data.train), len(data.validation)) == (10, 3)
    assert data.report.validation is not None
    assert data.report.validation.rows.validation == 3
    assert adds_up(data.report.rows)
    assert any("1 row has a request that is trained on too" in notice for notice in data.notices)


def test_the_same_request_is_never_on_both_sides(tmp_path):
    file = write(tmp_path, [row(n % 20, answer=str(n)) for n in range(60)])
    data = prepared(file, validation_split=0.3, template="plain")
    sides = [{TOKENIZER.decode(r.input_ids).split("?")[0] for r in rows} for rows in (data.train, data.validation)]

    assert not sides[0] & sides[1]
    assert len(data.validation) == 18


@pytest.mark.parametrize(("rows", "validation"), [(1, 0), (2, 1), (3, 1), (30, 3)])
def test_small_sets_are_split_too(tmp_path, rows, validation):
    assert len(prepared(write(tmp_path, [row(n) for n in range(rows)])).validation) == validation


def test_labels_keep_their_share_on_both_sides(tmp_path):
    file = write(tmp_path, [row(n, label=n % 4 == 0) for n in range(200)])
    data = prepared(file, include_undesirable=True, validation_split=0.2)
    desirable = sum((r.origin.line - 1) % 4 == 0 for r in data.validation)

    assert (len(data.validation), desirable) == (40, 10)


def test_preparation_is_a_function_of_files_configuration_and_seed(tmp_path):
    file = write(tmp_path, [row(n) for n in range(40)])
    first, again, other = prepared(file), prepared(file), prepared(file, seed=2)
    write(tmp_path, [row(n) for n in range(39)] + [row(39, answer="no")])
    changed = prepared(file)

    assert first.fingerprints == again.fingerprints
    assert first.fingerprints["sha256"] != other.fingerprints["sha256"]
    assert first.fingerprints["sha256"] != changed.fingerprints["sha256"]
    assert first.fingerprints["files"][0]["sha256"] != changed.fingerprints["files"][0]["sha256"]
    assert first.fingerprints["tokens"] == sum(map(len, first.train))


def test_samples_pair_a_prompt_as_trained_with_its_answer(tmp_path):
    data = prepared(write(tmp_path, [row(n) for n in range(20)]), samples=2, template="chatml")

    assert len(data.samples) == 2
    for sample in data.samples:
        assert sample.expected == "yes"
        assert sample.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert sample.prompt_ids[0] == TOKENIZER.bos_id
        assert any(tuple(r.input_ids[: len(sample.prompt_ids)]) == sample.prompt_ids for r in data.validation)


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        ([{"text": "Once upon a time."}] * 3, "plain"),
        ([{"prompt": "a", "completion": "b"}], "alpaca"),
        ([{"prompt": "a", "completion": "b", "system": "c"}], "chatml"),
    ],
)
def test_without_a_name_the_template_suits_the_rows(tmp_path, rows, template):
    assert prepared(write(tmp_path, rows)).template.name == template


def test_evaluation_keeps_every_row_and_copy(tmp_path):
    file = write(tmp_path, [row(1), row(1), row(2), row(3, answer="")])
    config = DataConfig(train_file="unused", template="chatml", max_error_rate=0.5)
    data = prepare_evaluation(file, config, tokenizer=TOKENIZER, context_length=None)

    assert (len(data.rows), len(data.samples)) == (3, 3)
    assert data.report.rows.validation == 3
    assert data.report.rows.dropped == 1
    assert adds_up(data.report.rows)


def test_text_samples_continue_the_beginning_of_a_row(tmp_path):
    data = prepared(write(tmp_path, [{"text": f"Once upon a time, {n}"} for n in range(10)]), samples=1)
    sample = data.samples[0]

    assert (sample.prompt + sample.expected).replace(" ", "").startswith("Onceuponatime,")


def test_notices_are_told_as_they_are_found(tmp_path):
    told: list[str] = []
    config = DataConfig(train_file=write(tmp_path, [row(n) for n in range(5)]), max_length=4000)
    data = prepare_data(config, tokenizer=TOKENIZER, context_length=None, seed=1, on_notice=told.append)

    assert tuple(told) == data.notices
    assert any("data.max_length=4,000 has no effect" in notice for notice in told)
    assert any("Template: alpaca (data.template is not set)" in notice for notice in told)
    assert json.dumps(data.report.as_dict())


def test_rows_that_a_template_refuses_count_as_bad(tmp_path):
    system = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    file = write(tmp_path, [row(n) for n in range(30)] + [system], "data.jsonl")

    with pytest.raises(DataError, match="rows cannot be used"):
        prepared(write(tmp_path, [system] * 3 + [{"messages": [{"role": "user", "content": "a"}]}], "x.jsonl"))
    assert prepared(file).report.rows.dropped == 1
