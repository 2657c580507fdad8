"""A second, naive implementation to compare with: every frame's keys and values in a Python list, joined by torch.cat.

Written for obviousness, in the original's order of operations. On any machine the engine must agree with it bit for
bit while all frames stay in the window; recorded outputs also carry the rounding of the machine that recorded them.
"""

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from rolling_kv.config import ALL_FRAMES
from rolling_kv.sampling.schedule import flow_schedule


class NaiveAttention:
    """Keeps (key, value) per latent frame; forgets the oldest frames outside the sink before it attends."""

    def __init__(self, run):
        self.run = run
        self.frames = []

    def __call__(self, attn, x, encoder_hidden_states, attention_mask, rotary_emb):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q = self.norm(attn.to_q(x), attn.norm_q).unflatten(2, (attn.heads, -1))
        k = self.norm(attn.to_k(context), attn.norm_k).unflatten(2, (attn.heads, -1))
        v = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if encoder_hidden_states is None:
            q, k = self.rope(q), self.rope(k)
            run, tokens = self.run, x.shape[1] // self.run.count
            self.frames = self.frames[: run.start] + list(zip(k.split(tokens, 1), v.split(tokens, 1)))
            kept = list(range(len(self.frames)))
            if run.window != ALL_FRAMES and len(kept) > run.window:
                kept = kept[: run.sink] + kept[len(kept) - (run.window - run.sink) :]
            run.attended = kept
            k = torch.cat([self.frames[i][0] for i in kept], 1)
            v = torch.cat([self.frames[i][1] for i in kept], 1)
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    @staticmethod
    def norm(x, norm):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight

    def rope(self, x):
        grid = (self.run.count, *self.run.grid)
        position = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid])
        position[:, 0] += self.run.start
        half = x.shape[-1] // 2
        dims = (half - 2 * (half // 3), half // 3, half // 3)
        angles = [
            torch.outer(position[:, axis], 1.0 / 10000.0 ** (torch.arange(0, 2 * n, 2).double() / (2 * n)))
            for axis, n in enumerate(dims)
        ]
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, 1))[None, :, None]
        return (
            torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).type_as(x)
        )


class NaiveRun:
    """Few-step sampling of one video. Uses up the transformer: its processors stay replaced."""

    def __init__(self, model, prompt):
        self.transformer, self.sampling = model.transformer, model.preset.sampling
        self.window, self.sink = model.preset.cache.window, model.preset.cache.sink
        self.prompt = prompt
        for block in self.transformer.blocks:
            block.attn1.processor = NaiveAttention(self)
            block.attn2.processor = NaiveAttention(self)
        self.start = 0  # absolute latent frame of the current chunk
        self.count = 0  # its latent frames
        self.attended = []  # absolute frames that the last pass attended to

    @torch.inference_mode()
    def forward(self, x, timestep, rows):
        """x: [B, C, f, h, w]. The time embedding is computed in `rows` rows, as the original does."""
        self.count, self.grid = x.shape[2], (x.shape[3] // 2, x.shape[4] // 2)
        embedder = self.transformer.condition_embedder
        half = embedder.timesteps_proj.num_channels // 2
        angles = timestep * torch.pow(10000, -(torch.arange(half).double() / half))
        sinusoid = torch.cat([angles.cos(), angles.sin()]).expand(rows, -1)

        def embed(_, text, *args, **kwargs):
            time = embedder.time_embedder(sinusoid.to(torch.float32)).type_as(text)
            modulation = embedder.time_proj(torch.nn.functional.silu(time))
            return time[:1], modulation[:1], embedder.text_embedder(text), None

        embedder.forward = embed
        try:
            return self.transformer(x, torch.tensor([timestep]), self.prompt, return_dict=False)[0]
        finally:
            del embedder.forward

    def prefill(self, latents):
        """latents: [B, C, F, h, w]."""
        for chunk in latents.split(self.sampling.prefill_sizes(latents.shape[2]), dim=2):
            self.forward(chunk, 0.0, rows=1)
            self.start += chunk.shape[2]

    def keep(self, clean):
        """The context pass: a finished chunk, [B, C, f, h, w], becomes part of the past."""
        self.forward(clean, self.sampling.context_noise, rows=clean.shape[2])
        self.start += clean.shape[2]

    def chunk(self, noise):
        """noise(draw) -> [B, C, f, h, w]; returns the clean chunk and writes it to the lists."""
        timesteps, sigmas = flow_schedule(self.sampling.shift)
        levels = [1000 - step for step in self.sampling.denoising_steps]
        x = noise(0)
        for n, level in enumerate(levels):
            flow = self.forward(x, timesteps[level].item(), rows=x.shape[2])
            clean = (x.double() - sigmas[level].double() * flow.double()).float()
            if n + 1 < len(levels):
                following = sigmas[levels[n + 1]].reshape(1)
                x = (1 - following) * clean + following * noise(n + 1)
        self.keep(clean)
        return clean


def guided_chunk(cond, uncond, x):
    """Many steps with guidance, from noise x [B, C, f, h, w]: one `NaiveRun` per branch. Returns the clean chunk."""
    sampling = cond.sampling
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sampling.shift, solver_order=2
    )
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, sampling.num_inference_steps + 1)[:-1])
    for timestep in scheduler.timesteps:
        flows = [run.forward(x, timestep.item(), rows=x.shape[2]) for run in (uncond, cond)]
        x = scheduler.step(flows[0] + sampling.guidance_scale * (flows[1] - flows[0]), timestep, x).prev_sample
    for run in (cond, uncond):
        run.keep(x)
    return x
