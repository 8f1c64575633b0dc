"""C++ kernels for CPUs, compiled on first use; PyTorch computes the same where there is no compiler."""
