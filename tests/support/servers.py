"""ComfyUI servers as the live tests start them."""

from tools.comfyui.server import ComfyServer


def start(install, *options, packs=None):
    """A server that may not download."""
    return ComfyServer(install, options, environment={"HF_HUB_OFFLINE": "1"}, packs=packs)
