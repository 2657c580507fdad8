"""Many passes: a chunk, a video."""
