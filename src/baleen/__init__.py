"""Baleen: the DeepSeek-V3 system, whole and at any size."""
