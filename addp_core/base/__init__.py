"""What every other package uses: user errors, atomic file writes, stateless randomness and the number of CPU cores."""
