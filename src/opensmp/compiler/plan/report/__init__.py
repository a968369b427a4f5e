"""Reports on a plan: table, picture, explanation, predicted schedule."""
