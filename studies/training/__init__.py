"""One architecture, trained: plan, trainer, checkpoints, evaluation."""
