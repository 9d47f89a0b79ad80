"""Recipes: which parameters, what batch, what loss. To add one: its file here, its settings, its test."""
