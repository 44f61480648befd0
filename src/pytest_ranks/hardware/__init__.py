"""What this machine has, and what a test needs of it.

The probes never initialise a device and never import torch: they ask the driver's own tools and
the kernel.
"""
