"""One test item, function or script on N ranks."""
