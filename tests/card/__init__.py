"""A CUDA device for tests where there is none: torch's dispatcher believes in a card, and its
kernels are the CPU's.

    python -m tests.card -m gpu        # tests that need a card, without one

Numbers are a CPU's; devices, memory, waits of the host and recorded graphs are as on a card. What
only a card shows, that work goes on beside other work and how fast, is not shown.
"""
