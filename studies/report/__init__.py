"""What a study found: rankings, the page, trackers."""
