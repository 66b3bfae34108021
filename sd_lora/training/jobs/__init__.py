"""Several runs of one process over one base, which is loaded once and computed once for all."""
