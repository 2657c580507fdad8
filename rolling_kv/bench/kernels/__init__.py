"""How fast the kernels are that the passes are made of: attention by backend, and matrix products."""
