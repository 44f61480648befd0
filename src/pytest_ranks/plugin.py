"""The pytest entry point: hook functions only, each delegating to the module that knows."""

from __future__ import annotations
