"""What several videos cost whose passes run as one batch, beside the same videos one after the other."""
