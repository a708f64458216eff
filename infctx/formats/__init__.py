"""Model and state files, ours and others': reading, writing, tensor names, finding a model by its path, export."""
