"""Feasible candidates, priced, before anything runs."""
