"""A whole decode step in one call of C++, for CPUs; PyTorch computes the same where nothing compiles."""
