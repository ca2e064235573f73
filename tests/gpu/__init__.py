"""Tests that need CUDA. Where ALIGNPROP_GPU_TESTS_ON is "cpu" their bodies run there, as far as they can."""
