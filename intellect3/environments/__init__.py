"""What is attempted and how it is scored: the Environment protocol and built-in environments."""
