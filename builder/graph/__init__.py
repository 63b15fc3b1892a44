"""The graph: its types, the table of operations, what is legal, unrolling and rewriting."""
