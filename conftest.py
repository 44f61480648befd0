"""Settings of this repository's own test run."""

from __future__ import annotations

import os

# Tests make their own tiny models and data; nothing may wait for a network that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
