"""Ends with 0 where the ComfyUI of this container answers, and has the pack's nodes. Variable: PORT."""

import os
import sys
from urllib.request import urlopen

address = f"http://127.0.0.1:{os.environ.get('PORT', '8188')}/object_info/RollingKVSample"
with urlopen(address, timeout=10) as answer:
    sys.exit(b"RollingKVSample" not in answer.read())
