"""A run before it runs: sizes, device, strategy, memory, and the report about them."""
