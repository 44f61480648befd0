"""Worlds over several machines."""
