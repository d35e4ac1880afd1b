"""Methods built from the ops, one per file."""
