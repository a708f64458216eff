"""AdamW in little memory: 8-bit moments, bf16 weights and gradients, moments on the host."""
