"""The benchmark of the step caches: every method at several strengths on one model, in time, memory and quality."""
