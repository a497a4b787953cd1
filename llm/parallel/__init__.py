"""Devices: the mesh, and the rules that place logical axes on it."""
