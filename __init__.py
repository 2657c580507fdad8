"""Rolling KV: endless, steerable video in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here, so that tools which import this folder as a package need no ComfyUI.
    from .rolling_kv.installed import check_installed

    check_installed()

    from .nodes import RollingKVExtension

    return RollingKVExtension()
