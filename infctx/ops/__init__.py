"""The WKV ops in all their forms: the definition, plain torch, compiled for the CPU; `wkv` chooses among them and the
kernels of infctx/cuda."""
