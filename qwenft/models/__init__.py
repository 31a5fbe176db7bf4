"""The checkpoint in memory: loading, binding, adapters, loss, export."""

import logging

# On import bitsandbytes says at warning level that an optional 4-bit kernel is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
