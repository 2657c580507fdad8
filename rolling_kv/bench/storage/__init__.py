"""`python -m rolling_kv bench storage`: bytes, time and error of every way to keep the cache and the weights."""
