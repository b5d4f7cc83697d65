"""What tests and benchmarks share: cases, comparisons, metamorphic checks, the compile-only harness."""
