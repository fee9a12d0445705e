"""The seam: the only folder that imports vLLM; scripts/vllm_contract.py lists what it relies on."""
