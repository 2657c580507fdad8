"""`python -m rolling_kv bench`: time, memory and correctness of the rolling cache beside other ways to make a chunk."""
