"""Generation and what is measured on it."""
