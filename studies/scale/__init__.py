"""From small sizes to large ones: which candidate wins there, and how sure that is."""
