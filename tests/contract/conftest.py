from tests.support.engine_fixtures import engine, llama, tied_llama

__all__ = ["engine", "llama", "tied_llama"]
