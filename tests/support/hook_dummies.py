"""A dummy transformer whose passes tell what they attended to, and a pass of a tiny Wan transformer."""

import torch
from diffusers.models.cache_utils import CacheMixin

from rolling_kv.hooks import attach as hooks
from rolling_kv.hooks.attach import apply_rolling_kv_cache, get_rolling_kv_cache_state
from rolling_kv.hooks.state import RollingKVCacheConfig

SIZE = (8, 12)  # latents: 24 tokens per latent frame
TOKENS = 24


class PlainAttention(torch.nn.Module):
    """Keys and values are the tokens themselves, so that a test can read what is attended."""

    def __init__(self):
        super().__init__()
        self.heads = 1
        self.to_q, self.to_k, self.to_v = (torch.nn.Identity() for _ in range(3))
        self.norm_q, self.norm_k = torch.nn.Identity(), torch.nn.Identity()
        self.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Dropout(0.0)])

    def forward(self, hidden_states):
        return hidden_states


class CrossAttention(PlainAttention):
    is_cross_attention = True


class Between(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class Transformer(torch.nn.Module, CacheMixin):
    def __init__(self):
        super().__init__()
        self.first, self.between, self.second = PlainAttention(), Between(), PlainAttention()
        self.cross = CrossAttention()

    def forward(self, hidden_states):
        residual = hidden_states
        self.first(hidden_states)
        self.between(hidden_states)
        self.second(hidden_states)
        return self.cross(residual)


class Dummy:
    """A dummy transformer under the hooks, called with numbers; remembers what its passes attended to."""

    def __init__(self, monkeypatch, *config):
        self.transformer = Transformer()
        self.attended = []

        def dispatch(query, key, value, backend=None):
            assert torch.equal(key, value)
            self.attended.append(sorted(int(token) for token in key[0, :, 0, 0]))
            return query

        monkeypatch.setattr(hooks, "dispatch_attention_fn", dispatch)
        apply_rolling_kv_cache(self.transformer, RollingKVCacheConfig(*config))

    def __call__(self, *tokens, batch=1) -> list[int]:
        """One pass; returns the tokens that both its layers attended to."""
        self.attended.clear()
        with torch.no_grad():
            self.transformer(torch.tensor(tokens).float().view(1, -1, 1).expand(batch, -1, 2))
        assert len(self.attended) == 2 and self.attended[0] == self.attended[1]
        return self.attended[0]

    @property
    def state(self):
        return get_rolling_kv_cache_state(self.transformer)

    def overwrite(self, offset):
        self.state.configure_cache_write("overwrite", absolute_token_offset=offset)

    def cached(self) -> list[int]:
        """What is in the cache, without a change to it."""
        self.state.clear_cache_write()
        self.state.should_update_cache = False
        try:
            return self()
        finally:
            self.state.should_update_cache = True


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_pass(transformer, latents=None, timestep=0.0, prompt=None):
    latents = noise(1, 16, 2, *SIZE) if latents is None else latents
    prompt = noise(len(latents), 6, transformer.config.text_dim) if prompt is None else prompt
    with torch.no_grad():
        return transformer(latents, torch.full((len(latents),), timestep), prompt, return_dict=False)[0]
