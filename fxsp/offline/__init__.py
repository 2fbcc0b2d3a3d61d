"""What the compiler would do, without a process group, devices or weights: explained, verified, and why."""
