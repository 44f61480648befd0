"""What is reported of ranks."""
