"""What a partitioned graph costs: operations, memory, bytes with their formula, and a timeline."""
