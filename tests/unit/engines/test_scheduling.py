"""Who is under way together, and whose prompt is read."""

from finetune.core.types import GenerationRequest
from finetune.engines.scheduling import CACHE_BYTES, Limits, Share, fits, limits_for, next_share


def request(prompt: int, answer: int) -> GenerationRequest:
    return GenerationRequest(tuple(range(1, prompt + 1)), answer)


def test_rows_are_admitted_up_to_their_number_and_their_memory() -> None:
    active = [request(10, 10)] * 3
    assert fits(request(10, 10), active, Limits(rows=4))
    assert not fits(request(10, 10), active, Limits(rows=3))
    assert fits(request(10, 40), active, Limits(cache_tokens=200))
    assert not fits(request(10, 41), active, Limits(cache_tokens=200))  # 4 rows of 51


def test_a_request_alone_is_always_admitted() -> None:
    assert fits(request(500, 500), [], Limits(cache_tokens=10))


def test_a_step_reads_half_of_the_oldest_prompt_and_then_the_shortest() -> None:
    remaining = [1000, 300, 20]
    assert next_share(remaining, 512, 0, first=True) == Share(0, 256)
    assert next_share(remaining, 256, 0, first=False) == Share(2, 20)
    assert next_share(remaining[:2], 236, 0, first=False) == Share(1, 236)


def test_a_prompt_alone_is_read_with_the_whole_step() -> None:
    assert next_share([1000], 512, 64, first=True) == Share(0, 512)
    assert next_share([3], 512, 64, first=True) == Share(0, 3)


def test_the_last_few_tokens_of_a_prompt_do_not_wait_for_another_step() -> None:
    assert next_share([576], 512, 64, first=True) == Share(0, 576)
    assert next_share([577], 512, 64, first=True) == Share(0, 512)
    assert next_share([900, 300], 236, 64, first=False) == Share(1, 300)
    assert next_share([900, 301], 236, 64, first=False) == Share(1, 236)


def test_the_memory_for_keys_and_values_decides_how_many_tokens_are_under_way() -> None:
    """Llama 3 8B: 32 layers, 8 heads of 128 values for keys and for values, in 2 bytes: 128 KiB a token."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    assert limits_for(config, 2).cache_tokens == CACHE_BYTES // (128 << 10)
    assert limits_for({"model_type": "of tomorrow"}, 2) == Limits()
