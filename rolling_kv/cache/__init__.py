"""What is kept: keys and values of the frames in the window. Knows no model."""
