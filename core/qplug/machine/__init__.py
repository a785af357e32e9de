"""What a run computes with: devices, processes and clocks."""
