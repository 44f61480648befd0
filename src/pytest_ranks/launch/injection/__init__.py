"""What makes faults strike."""
