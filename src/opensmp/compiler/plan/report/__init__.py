"""Views of a plan: table, picture, explanation, predicted schedule."""
