"""What training did: inputs of forwards, optimizer steps, collectives."""
