"""Many processes, one run: how ranks divide the work, start, watch each other and end, and reduce gradients."""
