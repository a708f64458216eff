"""What numba compiles for the CPU: the kernels of the WKV ops, and of chains of elementwise steps of the model.

Importing this compiles nothing and does not import numba.
"""
