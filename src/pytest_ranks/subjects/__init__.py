"""Ready-made subjects: trainers that the suites can be pointed at."""
