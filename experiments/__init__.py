"""Programs that run the library on real data: `demo`, `reproduce`, the experiments of
the paper and its siblings, and the audits of real networks."""

# The experiments of `reproduce`: here, where naming them loads none of them.
NAMES = (
    "errata",
    "table2",
    "table3",
    "adjoint",
    "likelihood",
    "prior",
    "sinkhorn",
    "nsgf",
    "particles",
    "reflow",
    "langevin",
)
