"""The laboratory: trains the methods side by side and compares them honestly."""
