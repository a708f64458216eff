"""The benchmark: speed and memory of training on this machine, next to a matrix product, and next to another commit."""
