"""What each rule of the cache does to the bundled model, measured from the pixels: the second half of docs/models.md."""
