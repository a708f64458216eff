"""The CUDA kernels of the WKV op, and the code that builds and launches them; importing this touches no compiler and
no GPU."""
