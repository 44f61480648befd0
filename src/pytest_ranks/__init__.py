"""Test training code on real ranks."""

from __future__ import annotations

__version__ = "0.1.0"
