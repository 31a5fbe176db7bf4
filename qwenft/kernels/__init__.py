"""The flat stream's layout and the torch code of our own."""
