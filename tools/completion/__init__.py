"""Completion of verbs, recipes, keys and values in shells."""
