"""Many processes, one run: who has what, how they start, watch each other and end, how gradients meet."""
