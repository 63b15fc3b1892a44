"""Who proposes, who stops, who decides."""
