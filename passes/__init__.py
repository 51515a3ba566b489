"""Graph passes: from a joint forward+backward graph to a partition that saves few-bit codes.

Read in this order: ``sites`` finds what could be coded, ``representations`` says how, ``plan`` decides for
each site, ``gain`` drops what buys no memory, ``rewrite`` edits the graphs by ``splice``, and ``softmax_rows``
mends what codes would do to the gradient of a softmax. ``pipeline`` lists these passes, and ``partitioner`` is
what Inductor calls.
``bytes_per_row`` shares out the saved bytes for ``record``, which keeps what happened.
"""
