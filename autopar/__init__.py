"""autopar: an automatic parallelization compiler for PyTorch."""
