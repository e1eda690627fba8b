"""What the trainers of this project share; the methods themselves are in the scripts, and nothing here imports one."""
