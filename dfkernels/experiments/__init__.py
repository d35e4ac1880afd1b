"""What the command line runs on real data: `demo`, and `reproduce`, the paper's experiments."""
