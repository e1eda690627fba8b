"""Ways to learn beside the paper's, and what trainers of one kind share; knows no flag of another method."""
