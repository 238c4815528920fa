"""Laws and how they are fitted: numbers in, numbers out."""
