"""Devices, processes and hosts: meshes, sharding, and how processes agree and notice each other."""
