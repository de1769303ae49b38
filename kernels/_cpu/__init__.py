"""Products of few bits on x86 processors: C++ that is compiled where it runs."""
