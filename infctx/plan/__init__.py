"""The plan of a run before it starts: sizes, device, strategy, memory, and the report about them."""
