"""The suites: one file a suite, one function `check_<claim>` a claim."""
