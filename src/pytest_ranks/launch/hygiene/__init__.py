"""What a test left behind in a rank that serves other tests: seen, named, put back."""
