"""`addp data`: public datasets, downloaded, verified and unpacked."""
