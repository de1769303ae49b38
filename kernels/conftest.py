"""What kernel tests share."""

import os

# Triton decides when a kernel is defined whether it will be interpreted: those tests run in a process of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*_interpreted_test.py"]
