"""`python -m rolling_kv bench`: what the engine takes in time and memory, and what that buys."""
