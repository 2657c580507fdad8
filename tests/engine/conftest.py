import pytest
from hook_dummies import Dummy


@pytest.fixture
def dummy(monkeypatch):
    """Makes a dummy transformer under the hooks, from the arguments of a RollingKVCacheConfig."""
    return lambda *config: Dummy(monkeypatch, *config)
