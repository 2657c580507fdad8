"""A VAE of a few lines for recomputed contexts, whose streams depend on every frame that they have seen."""

import torch


class StandInVae:
    """seen: latent frames that each stream was given, in turn."""

    def __init__(self):
        self.seen: list[int] = []

    def reencoder(self):
        number, carried = len(self.seen), None
        self.seen.append(0)

        def reencode(latents):
            nonlocal carried
            for frame in latents.split(1, dim=2):
                carried = frame if carried is None else 0.25 * carried + frame
                self.seen[number] += 1
            return torch.tanh(carried)

        return reencode
