"""What the laws are fitted to and read with: runs, compute, held-out losses."""
