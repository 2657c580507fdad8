"""The recorded cases of the original implementations, made on this device: how far from the recordings they are."""
