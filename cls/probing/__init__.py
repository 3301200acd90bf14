"""Linear probing: the published training of one head (`full.py`), and many heads on stored features (`fast.py`)."""
