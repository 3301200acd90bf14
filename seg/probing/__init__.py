"""`addp seg probe`: patch features of a frozen encoder, probes of them, and their report."""
