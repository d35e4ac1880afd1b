"""Programs that run the library on real data: `demo`, and `reproduce`, the paper's experiments."""

# The experiments of `reproduce`: here, where naming them loads none of them.
NAMES = ("errata", "table2", "table3", "adjoint", "likelihood")
