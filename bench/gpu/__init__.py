"""The Python side of bench/gpu_check.sh."""
