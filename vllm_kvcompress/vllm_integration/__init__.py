"""The seam: the only folder that imports vLLM. See `compat` for every name it relies on."""
