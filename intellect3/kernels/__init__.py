"""Kernels: one interface each, several implementations, every one tested against the plain one."""
