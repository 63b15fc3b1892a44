"""What a study leaves on disk: trials, the journal, the folder."""
