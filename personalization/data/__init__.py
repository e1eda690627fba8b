"""What is learned from: pictures, captions, prompts, and the examples that a step draws; knows no model class."""
