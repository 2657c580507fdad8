"""What it costs and brings to make one video on several processes."""
