"""Recipes, their keys, the verbs and the command line."""
