"""What the command line runs on real data: `demo`, and `reproduce`, the paper's experiments."""

NAMES = ("errata", "table2", "table3", "adjoint", "likelihood")  # of reproduce; here, where naming them loads nothing
