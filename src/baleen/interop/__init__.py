"""Checkpoints from and to the world."""
