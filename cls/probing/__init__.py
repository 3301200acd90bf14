"""Linear probing in two modes: the published training of one head (`full`), and a sweep over stored features (`fast`)."""
