"""What pages see of runs while they go on: their progress, and pictures of what is made. Only `watching` knows ComfyUI."""
