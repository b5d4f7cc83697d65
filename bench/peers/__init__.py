"""What we are compared with. A peer says why it cannot run here, its version, and how it is called.

Each module has `candidates(op, mode, device, wheel) -> list[Candidate | tuple[str, str]]`: a pair is (name, reason).
"""
