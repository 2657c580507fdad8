"""What the live preview costs beside the sampling."""
