"""Devices, processes and hosts: meshes, sharding, agreement of processes, and detection of lost processes."""
