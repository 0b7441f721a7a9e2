"""Checkpoints: the state at a step boundary, in verified pieces, and nothing else.

A state image is an opaque string of bytes here, and its digest an opaque name for it. It is cut
into one piece per shard; whoever plays a shard writes its piece, and the manifest, written last,
makes a checkpoint of the pieces. What is in an image is `p2p/state.py`'s business; when one is due
is decided by the peer.
"""

from checkpoint.manifest import Manifest
from checkpoint.reader import Restored, newest, read
from checkpoint.storage import LocalFolder, Storage, open_storage
from checkpoint.writer import AsyncWriter, Written, retire, try_complete, write_pieces

__all__ = [
    "AsyncWriter",
    "LocalFolder",
    "Manifest",
    "Restored",
    "Storage",
    "Written",
    "newest",
    "open_storage",
    "read",
    "retire",
    "try_complete",
    "write_pieces",
]
