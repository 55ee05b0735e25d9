"""Models and adapters as GGUF, the files of llama.cpp, Ollama and LM Studio."""
