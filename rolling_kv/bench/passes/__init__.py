"""One pass of the model with a full window: its time by kind of kernel, and the bytes announced for it beside the real ones."""
