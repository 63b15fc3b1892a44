"""Architectures and spaces in words and pictures, schemas, the terminal."""
