"""Searching from Python."""
