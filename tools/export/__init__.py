"""`addp export`: a checkpoint in another layout."""
