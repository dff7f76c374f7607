"""SEA in Triton."""
