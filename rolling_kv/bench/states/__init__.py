"""`python -m rolling_kv bench states`: what it costs to make a video in several runs, to fork it, and to put it away."""
