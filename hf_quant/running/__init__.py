"""Long work: resumed after a kill, locked, shared between processes, seen on a bar."""
