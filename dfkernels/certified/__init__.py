"""Certified sparse evaluation: the atoms that can carry weight, with a bound on all others.

docs/certified.md derives the bounds. ``rounding`` has every rounding term of the certificate.
``index`` says what an index of a cloud is, ``build`` makes one, ``index_file`` stores it.
``bounds`` has the bounds on a query's logits. ``select_atoms`` declares the op, which ``reference``
defines and which runs compiled (csrc/certified/), in Triton (``triton``, ``triton_bounds``) or in
PyTorch (``pytorch``, the fallback). ``heaviest`` is the exact search for the k heaviest atoms
without an index.
"""
