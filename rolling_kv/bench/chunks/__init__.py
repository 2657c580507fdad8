"""`python -m rolling_kv bench`: time and memory of the rolling cache beside other ways to make the same chunks."""
