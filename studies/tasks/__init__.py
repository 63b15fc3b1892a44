"""What is learned: how a batch is made and scored, what is told of a result, what a finished model shows."""
