"""From a prompt to a video file: frames per second, time to the first frame, and what each part takes alone."""
