"""The controller's terminal, shared with ranks."""
