"""CPUs: vLLM's own attention kernel on pages of single KV heads."""
