"""What turns a prompt into tokens: a managed llama.cpp, Ollama, OpenAI-compatible servers."""
