"""The CUDA kernels of the WKV op, and what builds and launches them; importing this touches no compiler and no GPU."""
