"""Products of few bits on x86 processors: one C++ file, compiled where it runs."""
