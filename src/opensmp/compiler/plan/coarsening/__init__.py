"""From the operations of a traced graph to few units."""
