"""What is learned from finished trials."""
