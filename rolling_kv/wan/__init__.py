"""One pass of a stock diffusers Wan transformer, with a rolling cache attached."""
