"""What measures this project: scripts that write JSON files, and the tables that are made of those."""
