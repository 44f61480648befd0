"""Every fixture that this plugin offers."""

from __future__ import annotations
