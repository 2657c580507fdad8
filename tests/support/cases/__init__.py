"""The recorded cases of the original implementations, and what turns each into calls of the engine."""

import os
from pathlib import Path

from .case import Case, read_config
from .infinity_rope import InfinityRope
from .krea import Krea
from .longlive import LongLive
from .longlive2 import LongLive2
from .memrope import MemRope
from .reward_forcing import RewardForcing
from .rolling_forcing import RollingForcing
from .self_forcing import SelfForcing
from .self_gradient_forcing import SelfGradientForcing

DATA = Path(__file__).parents[2] / "data"
FOLDER = Path(os.environ.get("ROLLING_KV_CASES", DATA))
FAMILIES = {
    "infinity-rope": InfinityRope,
    "krea": Krea,
    "longlive": LongLive,
    "longlive2": LongLive2,
    "memrope": MemRope,
    "reward-forcing": RewardForcing,
    "rolling-forcing": RollingForcing,
    "self-forcing": SelfForcing,
    "self-gradient-forcing": SelfGradientForcing,
}


def load_cases(*families: str, folder: Path = FOLDER) -> list[Case]:
    """Every recorded case in a folder and the folders in it, of all families or of some."""
    paths = sorted(path for path in folder.rglob("*.safetensors") if not path.stem.startswith("weights"))
    recorded = [(path, read_config(path)) for path in paths]
    return [
        FAMILIES[config["family"]](path, config)
        for path, config in recorded
        if not families or config["family"] in families
    ]


__all__ = ["DATA", "FOLDER", "Case", "load_cases"]
