"""What a model remembers: each measure is a file, from a model and a token store to rows of numbers and a table.

Reading order: evaluation (all measures of a model) -> positions, reach, forgetting, recall, needle, states; they share
predictions (a model reads), text (a store as one text) and bootstrap (standard errors).
"""

MEASURES = ("positions", "reach", "forgetting", "recall", "needle", "states")
"""What `infctx evaluate --what` takes, in the order in which it is measured."""
