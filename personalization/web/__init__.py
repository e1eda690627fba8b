"""The web page: what a visitor chose as a command line, processes, and what is shown of them; needs no PyTorch."""
