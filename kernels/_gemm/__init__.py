"""The one matrix product of every packed format: main loop, decode functions, configurations. Derivation: README.md."""
