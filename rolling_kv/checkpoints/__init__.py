"""From files to weights. Knows no cache and no pass."""
