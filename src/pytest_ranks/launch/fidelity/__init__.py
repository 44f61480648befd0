"""How real the ranks of a test are: one test body on threads, in one process, on real ranks."""
