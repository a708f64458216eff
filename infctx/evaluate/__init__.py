"""What a model has learned: its loss by position, and what it writes."""
