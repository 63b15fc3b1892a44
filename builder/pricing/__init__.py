"""What a graph costs, limits on it, and how choices are steered into them."""
