"""The compiled CPU kernels: C++ over AVX2, AVX-512 or portable vectors, called with raw pointers."""
