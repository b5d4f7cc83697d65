"""Plain-torch definitions of every op: `loop` is the truth (float64, tests), `chunked` the automatic fallback."""
