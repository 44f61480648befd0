"""What a session tells its user."""
