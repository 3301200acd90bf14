"""`addp doctor check=true`: whether this machine computes what it should, and how fast."""
