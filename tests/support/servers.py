"""ComfyUI servers as the live tests start them."""

from tools.comfyui.server import ComfyServer


def start(install, *options, packs=None):
    """A server that may not download, with one thread: models this small gain nothing from a second one."""
    return ComfyServer(install, options, environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, packs=packs)
