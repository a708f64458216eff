"""Models and states as files, ours and others': reading, writing, names, what people name as a model, export."""
