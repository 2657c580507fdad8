"""What decoding costs: a latent frame by the VAE as diffusers has it, as it is loaded here, and by a tiny decoder."""
