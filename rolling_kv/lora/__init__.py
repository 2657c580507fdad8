"""LoRA files, and applying them to a model."""
