"""The partitioner: cuts a graph of units into partitions."""
