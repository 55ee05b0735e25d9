"""Which cached prefix stands for a prompt, and which are forgotten."""

from finetune.engines.prefixes import Found, PrefixCache

PROMPT = tuple(range(100, 120))


def filled(*tokens: tuple[int, ...], budget: int = 100, size: int = 10) -> PrefixCache[str]:
    prefixes: PrefixCache[str] = PrefixCache(budget)
    for number, row in enumerate(tokens):
        prefixes.store("one", row, f"cache {number}", size=size)
    return prefixes


def test_the_prefix_that_shares_most_tokens_is_found() -> None:
    prefixes = filled((*PROMPT[:8], 1, 2), (*PROMPT[:12], 1, 2), PROMPT[:5])
    assert prefixes.find("one", PROMPT) == Found("cache 1", 12)
    assert prefixes.find("one", (1, *PROMPT)) is None


def test_an_adapter_never_sees_the_prefixes_of_another() -> None:
    assert filled(PROMPT).find("two", PROMPT) is None
    assert filled(PROMPT).find(None, PROMPT) is None


def test_a_cache_that_cannot_be_cut_stands_for_whole_prefixes_only() -> None:
    prefixes: PrefixCache[str] = PrefixCache()
    prefixes.store("one", PROMPT[:12], "cache", size=1, shortest=10)
    assert prefixes.find("one", PROMPT) == Found("cache", 12)
    assert prefixes.find("one", (*PROMPT[:10], 1, 2)) == Found("cache", 10)
    assert prefixes.find("one", (*PROMPT[:9], 1, 2)) is None


def test_the_least_recently_used_prefix_is_forgotten_when_the_memory_is_full() -> None:
    first, second, third = PROMPT[:10], (1, *PROMPT), (2, *PROMPT)
    prefixes = filled(first, second, budget=25)
    prefixes.find("one", first)
    prefixes.store("one", third, "new", size=10)
    assert prefixes.find("one", second) is None
    assert prefixes.find("one", first) == Found("cache 0", 10)
    assert prefixes.size == 20


def test_a_cache_larger_than_the_memory_is_not_kept() -> None:
    prefixes = filled(PROMPT, size=101)
    assert (len(prefixes), prefixes.size) == (0, 0)


def test_a_longer_cache_takes_the_place_of_its_beginning() -> None:
    prefixes = filled(PROMPT[:8], PROMPT, PROMPT[:12])
    assert (len(prefixes), prefixes.size) == (1, 10)
    assert prefixes.find("one", PROMPT[:12]) == Found("cache 1", 12)


def test_a_longer_cache_that_cannot_be_cut_takes_nobodys_place() -> None:
    prefixes: PrefixCache[str] = PrefixCache()
    prefixes.store("one", PROMPT[:8], "short", size=1, shortest=6)
    prefixes.store("one", PROMPT, "long", size=1, shortest=18)
    assert prefixes.find("one", PROMPT[:8]) == Found("short", 8)


def test_prefixes_of_an_unloaded_adapter_are_forgotten() -> None:
    prefixes = filled(PROMPT)
    prefixes.store(None, PROMPT, "base", size=5)
    prefixes.forget("one")
    assert prefixes.find("one", PROMPT) is None
    assert prefixes.find(None, PROMPT) == Found("base", 20)
    assert prefixes.size == 5
