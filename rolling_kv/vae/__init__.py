"""From latents to pixels and back, chunk by chunk: Wan's VAEs and a tiny decoder, and the files that they come in."""
