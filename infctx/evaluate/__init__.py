"""Shows what a model has learned: its loss by position, and the text it generates."""
