"""Devices: the mesh, the rules that spread trees over it, placement of arrays, several processes, collectives."""
