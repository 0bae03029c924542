"""CUDA C++ kernels, compiled on first use; importing this package compiles nothing."""
