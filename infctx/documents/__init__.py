"""From people's files to documents: which files, what is in them, and what a model is to learn of it."""
