"""Text to tokens: sources, codecs, prepared corpora."""
