"""Models as files: bundles, Hugging Face, torch.export."""
