"""CUDA GPUs: FlashAttention for prompts, our decode kernel for ragged heads."""
