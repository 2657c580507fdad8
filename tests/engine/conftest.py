import pytest
import torch
from hook_dummies import Dummy

# The models here are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture
def dummy(monkeypatch):
    """Makes a dummy transformer under the hooks, from the arguments of a RollingKVCacheConfig."""
    return lambda *config: Dummy(monkeypatch, *config)
