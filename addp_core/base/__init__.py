"""What every other package uses: user errors, atomic file writes, random seeds, text tables and CPU cores."""
