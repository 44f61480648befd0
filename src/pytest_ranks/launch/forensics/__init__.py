"""What ranks are doing, and why they do not end."""
