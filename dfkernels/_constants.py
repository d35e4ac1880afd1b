"""Numbers on which Python, C++ and Triton must agree.

The build writes them into a C++ header as well (`_build/native.py`), in lower case: each line here
is ``NAME = integer``, with a comment that says what it is.
"""

QUERY_GROUP = 8  # queries with lists, or of a certified search, that share the rows they read
CHAIN_MOST_D = 16  # largest dimension of the fused transport chain
DRAW_BLOCK = 64  # rows of y that draw takes as one candidate at first
CODE_TILE = 64  # atoms side by side in the coarse codes of an index
MOST_AXES = 32  # largest number of principal axes of an index
